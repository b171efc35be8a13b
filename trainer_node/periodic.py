"""Something done now and then while something else runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def every(seconds: float, act: Callable[[], None], name: str) -> Iterator[None]:
    """Call `act` during the block, first after `seconds`, on a thread called `name`; it has ended when the block has."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=loop, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
