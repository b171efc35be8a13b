"""Calls and tokens a minute, calls a day; and who else uses an endpoint.

- No more than `rpm` calls and `tpm` tokens are started in any 60 s, and no more than `rpd` calls in a day that ends at midnight
  Pacific time, whichever of the processes that share a ledger starts them.
- What a process did stays counted when it is killed. A ledger that a kill has left half written is closed for a window.
- Stamps are seconds of the caller's clock. Processes that share a ledger need the same one: time.monotonic(), which is also
  anyio.current_time(). Stamps from the future are from before a reboot, and void.

The window is a ring of (stamp, tokens) in a mapped file, under a lock that is held for microseconds; without a ledger the same
ring lies in memory. The day's count stands in its header.
"""

import math
import mmap
import os
import struct
import time
import uuid
import weakref
import zlib
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Self

from config.errors import translate_os_errors
from config.locks import FileLock, Instant, alone, holder

# The server counts requests as they arrive. The first burst of a process arrives more than a second after its calls were claimed
# (clients and connections are made), the burst a minute later does not: calls that are claimed 60 s apart arrive closer.
_WINDOW_S = 61.5
_LAG_S = 2.0  # a caller may have read its clock that long ago; stamps further ahead are void
_CAPACITY = 2**16  # calls in a window
_EXHAUSTED = 2**62  # a day's count that leaves room for nothing

_HEADER = struct.Struct("<8sQQQQQd")
_CHECK = struct.Struct("<I")
_ENTRY = struct.Struct("<dQ")
_ENTRIES_AT = 128
_SIZE = _ENTRIES_AT + _CAPACITY * _ENTRY.size
_MAGIC = b"hafsrat1"


class _Header(NamedTuple):
    """Entries `tail` to `head` are in the window, with `tokens` in all; on `day`, `starts` calls were started. Nothing is started
    before the moment `closed_until`.
    """

    head: int = 0
    tail: int = 0
    tokens: int = 0
    day: int = 0
    starts: int = 0
    closed_until: float = -math.inf


class _Ring:
    """The ledger's bytes. Entries are written before the header that counts them."""

    def __init__(self, path: Path | None) -> None:
        self.lock: AbstractContextManager[None] = nullcontext()
        if path is None:
            self._bytes = mmap.mmap(-1, _SIZE)
            return
        with translate_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            weakref.finalize(self, os.close, handle)
            self.lock = Instant(handle)
            with self.lock:
                if os.fstat(handle).st_size < _SIZE:
                    os.ftruncate(handle, _SIZE)
            self._bytes = mmap.mmap(handle, _SIZE)

    def read(self) -> _Header | None:
        """None: a crash has left it half written, or it is no ledger of this version."""
        data = self._bytes[: _HEADER.size]
        magic, *values = _HEADER.unpack(data)
        if magic == _MAGIC and _CHECK.unpack_from(self._bytes, _HEADER.size)[0] == zlib.crc32(data):
            return _Header(*values)
        return _Header() if magic == bytes(len(_MAGIC)) else None

    def write(self, header: _Header) -> None:
        data = _HEADER.pack(_MAGIC, *header)
        self._bytes[: _HEADER.size + _CHECK.size] = data + _CHECK.pack(zlib.crc32(data))

    def entry(self, index: int) -> tuple[float, int]:
        stamp, tokens = _ENTRY.unpack_from(self._bytes, _ENTRIES_AT + index % _CAPACITY * _ENTRY.size)
        return stamp, tokens

    def put(self, index: int, stamp: float, tokens: int) -> None:
        _ENTRY.pack_into(self._bytes, _ENTRIES_AT + index % _CAPACITY * _ENTRY.size, stamp, tokens)


class Rates:
    """The window of one endpoint.

    Args:
        rpm, tpm, rpd: calls and tokens a minute, calls a day; None: no limit.
        ledger: a file that processes share; None: nobody else uses the endpoint. Without a limit it is not made.
        wall: Unix time in seconds, for the day. A clock that was set back does not bring a day back.

    Raises:
        StoreError: the ledger cannot be opened.
    """

    def __init__(
        self,
        rpm: int | None,
        tpm: int | None,
        rpd: int | None,
        *,
        ledger: Path | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._rpm, self._tpm, self._rpd = rpm, tpm, rpd
        self._ring = _Ring(ledger) if rpm or tpm or rpd else None
        self._own: defaultdict[int, deque[int]] = defaultdict(deque)  # tokens estimated -> this process's entries
        self._days = _Days(wall)
        self._exhausted_day: int | None = None

    def ready_at(self, now: float, tokens: int) -> float:
        """The earliest moment at which a call of so many tokens may start, as far as is known now; in the past: at once.

        After the last call of a day that is the day's end; inf for more tokens than a minute ever allows. It takes no lock: only
        `claim` knows for sure.
        """
        if self._ring is None:
            return self._days.end(now) if self._exhausted_day == self._days.number(now) else -math.inf
        header = self._ring.read()  # may be torn by a writer: at worst the answer is wrong for a moment
        return -math.inf if header is None else self._ready_at(header, now, tokens)

    def claim(self, now: float, tokens: int) -> bool:
        """Start a call of so many tokens now; False: the limits do not allow it."""
        if self._ring is None:
            return self.ready_at(now, tokens) <= now
        with self._ring.lock:
            header = self._current(now)
            if self._ready_at(header, now, tokens) > now:
                return False
            newest = self._ring.entry(header.head - 1)[0] if header.head > header.tail else now
            self._ring.put(header.head, max(now, newest), tokens)
            day, starts = self._today(header, now) if self._rpd else (header.day, header.starts)
            self._ring.write(
                header._replace(head=header.head + 1, tokens=header.tokens + tokens, day=day, starts=starts + bool(self._rpd))
            )
        if self._tpm:
            self._own[tokens].append(header.head)
        return True

    def correct(self, now: float, estimated: int, actual: int) -> None:
        """A call that was claimed with `estimated` tokens had `actual` ones."""
        if self._ring is None or not self._tpm:
            return
        with self._ring.lock:
            header = self._current(now)
            mine = self._own[estimated]
            while mine and not header.tail <= mine[0] < header.head:
                mine.popleft()
            if not mine:
                return  # its time in the window is over
            # Of equal estimates the oldest gives way: what it frees counts for the shortest time. What is more counts as now.
            oldest = mine.popleft()
            index = oldest if actual < estimated else header.head - 1
            stamp, tokens = self._ring.entry(index)
            changed = max(0, tokens + actual - estimated)
            if changed > tokens:  # the header never counts less than the entries
                self._ring.write(header._replace(tokens=header.tokens + changed - tokens))
            self._ring.put(index, stamp, changed)
            if changed < tokens:
                self._ring.write(header._replace(tokens=max(0, header.tokens + changed - tokens)))

    def exhaust_day(self, now: float) -> None:
        """The server says that the day's quota is used up, whatever was counted here."""
        self._exhausted_day = self._days.number(now)
        if self._ring is not None:
            with self._ring.lock:
                self._ring.write(self._current(now)._replace(day=self._exhausted_day, starts=_EXHAUSTED))

    def _current(self, now: float) -> _Header:
        """The header without what has left the window; the caller has the lock."""
        assert self._ring is not None
        header = self._ring.read()
        if header is None:  # nobody knows what was started: let a whole window pass
            header = _Header(closed_until=now + _WINDOW_S)
            self._ring.write(header)
        elif self._void(header, now):
            header = header._replace(tail=header.head, tokens=0)
        if header.closed_until > now + _WINDOW_S + _LAG_S:  # written before a reboot, too
            header = header._replace(closed_until=-math.inf)
        tail, tokens = header.tail, header.tokens
        while tail < header.head and (entry := self._ring.entry(tail))[0] + _WINDOW_S <= now:
            tail, tokens = tail + 1, tokens - entry[1]
        return header._replace(tail=tail, tokens=max(0, tokens) if tail < header.head else 0)

    def _ready_at(self, header: _Header, now: float, tokens: int) -> float:
        ready = self._days.end(now) if self._day_is_full(header, now) else -math.inf
        if header.closed_until <= now + _WINDOW_S + _LAG_S:
            ready = max(ready, header.closed_until)
        return ready if self._void(header, now) else max(ready, self._minute_ready_at(header, now, tokens))

    def _void(self, header: _Header, now: float) -> bool:
        assert self._ring is not None
        return header.head > header.tail and self._ring.entry(header.head - 1)[0] > now + _LAG_S

    def _minute_ready_at(self, header: _Header, now: float, tokens: int) -> float:
        assert self._ring is not None
        ready = -math.inf
        most = min(self._rpm or _CAPACITY, _CAPACITY)
        if header.head - header.tail >= most:
            ready = self._ring.entry(header.head - most)[0] + _WINDOW_S
        if self._tpm is None:
            return ready
        if tokens > self._tpm:
            return math.inf
        used, index = header.tokens, header.tail
        while used + tokens > self._tpm and index < header.head:
            stamp, freed = self._ring.entry(index)
            used, index, ready = used - freed, index + 1, max(ready, stamp + _WINDOW_S)
        return ready

    def _day_is_full(self, header: _Header, now: float) -> bool:
        return header.starts > 0 and self._today(header, now)[1] >= (self._rpd or _EXHAUSTED)

    def _today(self, header: _Header, now: float) -> tuple[int, int]:
        """The day, and what was started on it. A count of tomorrow was made by a clock that is a little ahead, and is kept."""
        today = self._days.number(now)
        return (header.day, header.starts) if today <= header.day <= today + 1 else (today, 0)


class _Days:
    """Days in Pacific time, by number. Time passes as fast as the faster of both clocks says: one stands still while a laptop
    sleeps, the other can be set back.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._offset: float | None = None
        self._day = 0
        self._begin = self._end = -math.inf  # of that day, Unix time

    def number(self, now: float) -> int:
        self._look(now)
        return self._day

    def end(self, now: float) -> float:
        """The moment of the caller's clock at which this day ends."""
        return now + self._end - self._look(now)

    def _look(self, now: float) -> float:
        wall = self._wall()
        self._offset = wall - now if self._offset is None else max(self._offset, wall - now)
        moment = now + self._offset
        if not self._begin <= moment < self._end:
            self._day, self._begin, self._end = _pacific_day(moment)
        return moment


def _pacific_day(moment: float) -> tuple[int, float, float]:
    """Number, begin and end (Unix time) of the day that holds a moment."""
    from datetime import UTC, datetime, timedelta
    from datetime import time as time_of_day
    from zoneinfo import ZoneInfo

    zone = ZoneInfo("America/Los_Angeles")
    date = datetime.fromtimestamp(moment, UTC).astimezone(zone).date()
    begin, end = (datetime.combine(day, time_of_day(), zone).timestamp() for day in (date, date + timedelta(days=1)))
    return date.toordinal(), begin, end


class Participants:
    """The processes that use an endpoint now: a context manager that makes this one count, until it ends or is killed.

    Each holds a lock on a file of its own in `folder`. Files of the dead are removed by those who come.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.lock")

    def __enter__(self) -> Self:
        """Raises StoreError where the folder cannot be written."""
        with alone(self._folder / "door"):  # a file that is made but not yet locked looks like one of the dead
            for path in self._others():
                if holder(path) is None:
                    _remove(path)
            self._lock.acquire()
            self._lock.sign()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        _remove(self._lock.path)

    def count(self) -> int:
        """How many there are, this one counted. Asks the file system: about once a second is enough."""
        return 1 + sum(holder(path) is not None for path in self._others())

    def _others(self) -> list[Path]:
        return [path for path in self._folder.glob("*.lock") if path != self._lock.path]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows: somebody looks at it just now; the next who comes removes it
        return
