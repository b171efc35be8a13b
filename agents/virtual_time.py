"""A clock that does not wait: when every task sleeps, the time jumps to the next timer.

What runs on it must not reach outside the process: a socket or a thread that is waited for does not hold the time back. A
run that would sleep for ever is a RuntimeError.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for the timeout it moves the loop's time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []  # work is ready: nothing outside can be
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("deadlock: nothing runs and no timer is set")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` begins at 0 and moves only while everything sleeps."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtual(work: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run a coroutine function on the virtual clock and return its result."""
    return anyio.run(work, *args, backend_options={"loop_factory": VirtualTimeLoop})
