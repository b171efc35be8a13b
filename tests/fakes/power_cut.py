"""A disk that forgets, at a power cut, everything that was not synced: bytes of files, and names in folders.

It stands in for the module `os` where files are written. What happens goes to real files; beside them it keeps what a disk would
still have, by inode, and cuts the power in the middle of the operation it is told to.
"""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class PowerCut(BaseException):
    """Nothing after this moment has happened."""


class ForgetfulDisk:
    """`left`: operations until the power is cut."""

    def __init__(self, root: Path, left: int) -> None:
        self._root, self.left = root, left
        self.operations = 0
        self._bytes: dict[int, bytes] = {}  # of files, as they were last synced
        self._names: dict[Path, dict[str, int]] = {}  # of folders: name -> inode
        self._seen: dict[int, bytes] = {}  # of files, as they were when the power was cut
        for path in [root, *root.rglob("*")]:
            if path.is_dir():
                self._names[path] = _names(path)
            else:
                self._bytes[path.stat().st_ino] = path.read_bytes()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _operation(self) -> bool:
        """Whether the power is cut in this one."""
        if self.left < 0:
            raise PowerCut  # nobody does anything any more
        self.left -= 1
        self.operations += 1
        return self.left < 0

    def _cut(self) -> None:
        self._seen = {path.stat().st_ino: path.read_bytes() for path in self._root.rglob("*") if path.is_file()}
        raise PowerCut

    def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:
        if self._operation():
            self._cut()
        return os.open(path, flags, mode)

    def write(self, handle: int, data: bytes) -> int:
        if self._operation():
            os.write(handle, data[: len(data) // 2])
            self._cut()
        return os.write(handle, data)

    def ftruncate(self, handle: int, size: int) -> None:
        if self._operation():
            self._cut()
        os.ftruncate(handle, size)

    def replace(self, old: str | Path, new: str | Path) -> None:
        if self._operation():
            self._cut()
        os.replace(old, new)

    def fsync(self, handle: int) -> None:
        if self._operation():
            self._cut()
        os.fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self._names[path] = _names(path)
        else:
            self._bytes[os.fstat(handle).st_ino] = _content(handle)

    def wake(self, chance: random.Random) -> None:
        """Put the real files into a state that the disk may be in when the power is back."""
        kept = dict(self._kept(self._root, chance))
        shutil.rmtree(self._root)
        self._root.mkdir()
        for path, data in kept.items():
            if data is None:
                path.mkdir()
            else:
                path.write_bytes(data)

    def _kept(self, folder: Path, chance: random.Random) -> Iterator[tuple[Path, bytes | None]]:
        """What is in a folder: files with their bytes, folders with None, each before what is in it."""
        durable = self._names.get(folder, {})
        names = _names(folder) if chance.random() < 0.5 else durable  # a name that was not synced may be there or not
        for name, inode in names.items():
            path = folder / name
            if path.is_dir():
                yield path, None
                yield from self._kept(path, chance)
            else:
                yield path, self._may_hold(inode, chance)

    def _may_hold(self, inode: int, chance: random.Random) -> bytes:
        """What was synced, and of what came after it nothing, all, a beginning, or a beginning with a page lost in it."""
        durable = self._bytes.get(inode, b"")
        now = self._seen.get(inode, durable)
        if chance.random() < 0.4 or not now.startswith(durable):
            return chance.choice([durable, now]) if now.startswith(durable) or durable.startswith(now) else durable
        end = chance.randint(len(durable), len(now))
        if chance.random() < 0.3 and end < len(now):
            hole = chance.randint(end, len(now))
            return now[:end] + b"\0" * (hole - end) + now[hole:]
        return now[:end]


def _names(folder: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}


def _content(handle: int) -> bytes:
    return os.pread(handle, os.fstat(handle).st_size, 0)
