"""One JSONL file in the hands of its only writer.

All before `end` is whole and on the disk. What a write leaves behind that failed is cut off before the next one. A line counts as
written only if the file that it went to is still the one at its path: on most systems one can go on writing to a removed file.
A file that somebody else has made longer or shorter meanwhile is not written any more, and not cut either.
"""

import errno
import json
import os
from pathlib import Path

from campaigns.rows import fingerprint, following
from config.errors import StoreError

_BLOCK = 65536
_NEVER_SYNCED = 2**24  # bytes at the end in which a power cut may have left zeros: more than one write ever has
_FLAGS = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class RowFile:
    """All methods raise the OSError that the system gives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self._last = b""  # the bytes before `end`
        self._handle: int | None = None

    def open(self) -> None:
        """Open or create it, and cut off what a crash has torn. A last row that lacks nothing but its newline is given one."""
        self._handle = os.open(self.path, _FLAGS | os.O_CREAT, 0o644)
        self.end = _whole_end(self._handle)
        if _is_row(torn := _read_at(self._handle, self.end)):  # many an editor leaves the last line like that
            os.lseek(self._handle, 0, os.SEEK_END)
            os.write(self._handle, b"\n")
            os.fsync(self._handle)
            self.end += len(torn) + 1
        self._last = fingerprint(self.path, self.end)
        self._cut()

    def append(self, data: bytes) -> None:
        """Write whole lines; they are on the disk when this returns, or not in the file.

        Raises:
            StoreError: somebody else has changed the file.
        """
        assert self._handle is not None, "not open"
        handle = self._handle
        if os.lseek(handle, 0, os.SEEK_END) != self.end:
            raise self._lost("was changed by somebody else")
        rest = memoryview(data)
        try:
            while rest:  # a write may take less than all of it
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except OSError:
            self._cut()
            raise
        if not self.in_place():
            raise FileNotFoundError(errno.ENOENT, "it is no longer there", str(self.path))
        self.end += len(data)
        self._last = following(self._last, data)

    @property
    def last_line(self) -> bytes:
        """Its end, if it is a long one."""
        return self._last.rstrip().rpartition(b"\n")[2]

    def reopen(self) -> None:
        """Open it anew after a failure: the folder may have been moved away and back.

        Raises:
            StoreError: rows that were written are gone, and waiting will not bring them back.
        """
        self.close()
        try:
            self._handle = os.open(self.path, _FLAGS | (0 if self.end else os.O_CREAT), 0o644)
        except FileNotFoundError:
            if self.path.parent.exists():
                raise self._lost("was removed") from None  # no error of the system that may pass
            raise
        if fingerprint(self.path, self.end) != self._last:
            raise self._lost("was changed by somebody else")
        self._cut()

    def in_place(self) -> bool:
        """Whether the path still names the file that is open."""
        assert self._handle is not None, "not open"
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _cut(self) -> None:
        """Leave the file as it was after the last line that was written."""
        assert self._handle is not None, "not open"
        if os.lseek(self._handle, 0, os.SEEK_END) > self.end:
            os.ftruncate(self._handle, self.end)
            os.fsync(self._handle)

    def _lost(self, what: str) -> StoreError:
        return StoreError(
            f"{self.path} {what} while hafs was writing it",
            hint="put it back if you can; the same command continues with the rows that are there",
        )


def whole_end(path: Path) -> int:
    """Where `open` would cut the file off. Raises the OSError that the system gives."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return _whole_end(handle)
    finally:
        os.close(handle)


def _whole_end(handle: int) -> int:
    """Where the last whole line ends. A power cut may leave zeros in place of bytes that were never synced: they are torn too."""
    end = _first_zero(handle)
    while end > 0:
        begin = max(0, end - _BLOCK)
        if whole := _read_at(handle, begin, end - begin).rfind(b"\n") + 1:
            return begin + whole
        end = begin
    return 0


def _first_zero(handle: int) -> int:
    """Where the first zero at the end of the file is; the end of the file if there is none."""
    size = os.lseek(handle, 0, os.SEEK_END)
    for begin in range(max(0, size - _NEVER_SYNCED), size, _BLOCK):
        if (zero := _read_at(handle, begin, _BLOCK).find(b"\0")) >= 0:
            return begin + zero
    return size


def _read_at(handle: int, start: int, size: int = -1) -> bytes:
    """`size` bytes from `start` on, fewer at the end of the file; all there are without a size."""
    with open(handle, "rb", closefd=False) as file:
        file.seek(start)
        return file.read(size)


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
