"""Fault points: the named places at which a test ends this process as a power cut would, before or after what cannot be undone.

Nobody sets HAFS_KILL_AT but a test; without it a point is the entry of a block that does nothing. Its value is a list of
`point@n@latch`, separated by blanks: the process that comes to that point as the n-th one, counted over all processes, is
killed there. They count with the files latch.1, latch.2, …, so a point kills once.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

VARIABLE = "HAFS_KILL_AT"


class Fault(NamedTuple):
    point: str
    nth: int
    latch: str


def around(name: str) -> AbstractContextManager[None]:
    """The points `<name>.before` and `<name>.after` of a block; the second is not reached where the block raises."""
    return _points(name) if _ARMED else _NOTHING


def parse(text: str) -> list[Fault]:
    """What HAFS_KILL_AT says."""
    parts = [fault.split("@", 2) for fault in text.split()]
    return [Fault(point, int(nth), latch) for point, nth, latch in parts]


@contextmanager
def _points(name: str) -> Iterator[None]:
    _reach(f"{name}.before")
    yield
    _reach(f"{name}.after")


def _reach(point: str) -> None:
    for fault in _ARMED:
        if fault.point == point and _count(fault) == fault.nth:
            _die()


def _count(fault: Fault) -> int:
    """How many have come to this point, this time included; 0 once it has killed."""
    for number in range(1, fault.nth + 1):
        try:
            os.close(os.open(f"{fault.latch}.{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return number
    return 0


def _die() -> None:
    """Nothing is flushed and nobody is told. Windows has no SIGKILL; its SIGTERM ends a process in the same way."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


_NOTHING = nullcontext()
_ARMED = parse(os.environ.get(VARIABLE, ""))
