"""Ctrl-C, and a terminal that is closed: the first signal lets what runs finish, the second one cancels it."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import anyio

_SHOWN_ON = (1, 2)  # file descriptors: stdout, stderr


@contextmanager
def on_interrupt(drain: Callable[[], None], scope: anyio.CancelScope) -> Iterator[None]:
    """Within this block SIGINT, SIGTERM and SIGHUP call `drain`, and cancel `scope` when one comes again.

    Under nohup, which has SIGHUP ignored, it stays ignored.
    """
    loop = asyncio.get_running_loop()
    steps = iter([drain])
    terminals = [number for number in _SHOWN_ON if os.isatty(number)]

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(next(steps, scope.cancel))

    def hung_up(number: int, frame: FrameType | None) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # what is still shown would fail, and the end of the campaign with it
        for terminal in terminals:
            os.dup2(nowhere, terminal)
        os.close(nowhere)
        handle(number, frame)

    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        handlers[signal.SIGHUP] = hung_up
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
