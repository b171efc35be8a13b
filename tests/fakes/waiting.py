"""Waiting for what another process does."""

import time
from collections.abc import Callable


def wait_for(what: str, ready: Callable[[], object], deadline_s: float = 90) -> None:
    """Until `ready()` is true. Fails, with `what`, once the deadline has passed."""
    end = time.monotonic() + deadline_s
    while not ready():
        assert time.monotonic() < end, f"no {what} within {deadline_s} s"
        time.sleep(0.01)
