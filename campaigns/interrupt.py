"""Ctrl-C: the first one lets what runs finish, the second one cancels it."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import anyio


@contextmanager
def on_interrupt(drain: Callable[[], None], scope: anyio.CancelScope) -> Iterator[None]:
    """Within this block SIGINT and SIGTERM call `drain`, and cancel `scope` when they come again."""
    loop = asyncio.get_running_loop()
    steps = iter([drain])

    def handle(_number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(next(steps, scope.cancel))

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in signals]
    try:
        yield
    finally:
        for number, old in zip(signals, before, strict=True):
            signal.signal(number, old)
