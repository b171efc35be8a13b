"""A file lock of the operating system: one holder at a time, and a crash of the holder frees it at once.

The lock file is never removed: a removed file could be locked twice, under two inodes. Its text names the last holder.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import StoreError, StoreHeld, translate_os_errors

if sys.platform == "win32":
    import msvcrt

    _FAR = 2**30  # Windows locks bytes and then refuses to read them: lock one far behind the text

    def _lock(handle: int, *, shared: bool = False) -> None:  # Windows knows no shared lock here; a look may disturb a look
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

    def _wait_for_lock(handle: int) -> None:
        while True:
            try:
                return _lock(handle)
            except PermissionError:  # held: Windows has no lock that waits for less than a second
                time.sleep(0.001)

    def _unlock(handle: int) -> None:
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(handle: int, *, shared: bool = False) -> None:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def _wait_for_lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX)

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


class FileLock:
    """Child processes do not inherit it: Python's handles close on exec."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self, patience_s: float = 0.2) -> bool:
        """Take the lock; False if another process still has it after `patience_s`.

        The default outlasts a look at the lock (`holder`), which holds it for an instant.

        Raises:
            StoreError: the lock file cannot be opened.
        """
        with translate_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                _lock(handle)
            except OSError:  # the one way both systems say "held"
                if time.monotonic() >= deadline:
                    os.close(handle)
                    return False
                time.sleep(random.uniform(0.01, 0.05))  # a blocking lock would know no deadline
            else:
                self._handle = handle
                return True

    def sign(self) -> None:
        """Write this process's pid into the file that it holds."""
        assert self._handle is not None
        with translate_os_errors(self.path):
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, f"{os.getpid()}\n".encode())

    @property
    def handle(self) -> int:
        """The open file that is locked. POSIX: children that inherit it hold the lock too, until the last of them has ended."""
        assert self._handle is not None
        return self._handle

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def alone(path: Path, *, deadline_s: float = 60.0) -> Iterator[None]:
    """Wait for the lock and hold it for the block.

    Raises:
        StoreHeld: another process holds it for longer than `deadline_s`.
    """
    lock = FileLock(path)
    if not lock.acquire(deadline_s):
        raise StoreHeld(
            f"{path} has been held for {deadline_s:g} s", hint="look for another hafs process that hangs, then try again"
        )
    try:
        yield
    finally:
        lock.release()


class Instant:
    """A context manager over an open file: its lock, waited for. For what takes microseconds, and takes them often."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        _wait_for_lock(self._handle)

    def __exit__(self, *_: object) -> None:
        _unlock(self._handle)


def holder(path: Path) -> int | None:
    """The pid that holds the lock; None if it is free, 0 if nobody has ever signed it.

    To look is to hold a shared lock for an instant: looks do not disturb each other, and who wants the lock tries twice.

    Raises:
        StoreError: the file may not be opened.
    """
    try:
        with translate_os_errors(path):
            handle = os.open(path, os.O_RDWR)
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise
    try:
        _lock(handle, shared=True)
    except OSError:
        held = True
    else:
        held = False
    finally:
        os.close(handle)
    if not held:
        return None
    text = path.read_text(encoding="ascii", errors="replace").strip()
    return int(text) if text.isdecimal() else 0
