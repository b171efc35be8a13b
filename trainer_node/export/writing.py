"""Files that take minutes to write: whole under their name or not there at all, and refused before they begin on a full disk."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from config.errors import DiskFull, translate_os_errors
from config.files import replace, sync_folder
from trainer_node.machine import cores

T = TypeVar("T")
Told = Callable[[int, int], None]  # bytes done and in all; what it raises stops the writing
SPARE_BYTES = 2**28  # of the disk, left to others
MAX_WORKERS = 8  # more than a disk can feed


@contextmanager
def whole_file(target: Path, size: int) -> Iterator[Path]:
    """The path to write `size` bytes to, about; once the block ends the file has the name `target`, and is on the disk.

    Raises:
        DiskFull: there is less room than that.
        StoreError: it cannot be written.
    """
    partial = target.with_name(target.name + ".partial")
    with translate_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        require_room(target, size)
        try:
            yield partial
            _sync(partial)
            replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)


@contextmanager
def whole_folder(target: Path, size: int) -> Iterator[Path]:
    """As `whole_file`, for a folder of files; one that is there under that name makes way. Raises DiskFull, StoreError."""
    partial, old = (target.with_name(f"{target.name}{part}.partial") for part in ("", ".old"))
    with translate_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        require_room(target, size)
        shutil.rmtree(partial, ignore_errors=True)
        _settle(old, target)
        try:
            partial.mkdir()
            yield partial
            for path in partial.iterdir():
                _sync(path)
            sync_folder(partial)
            if target.exists():
                replace(target, old)  # to delete it takes a while, in which half of it would have the name
            replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _settle(old, target)
        sync_folder(target.parent)


def _settle(old: Path, target: Path) -> None:
    """What made way goes back to its name, unless a new one has that: then it goes."""
    if old.exists() and not target.exists():
        replace(old, target)
    shutil.rmtree(old, ignore_errors=True)


def require_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size + SPARE_BYTES:
        raise DiskFull(
            f"{target} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", hint="free some space on the node and try again"
        )


def in_order(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What the calls return, in their order; as many as there are cores run at once, and few wait for their turn."""
    workers = min(cores(), MAX_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[T]] = []
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            yield from (future.result() for future in waiting)
        finally:
            for future in waiting:
                future.cancel()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
