"""A disk that takes nothing for a while: the campaign waits, says so once, and loses nothing."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from campaigns import rowfile
from campaigns import store as store_module
from campaigns.rows import read_lines
from campaigns.store import Store
from config.errors import DiskFull, StoreError
from config.files import sync_folder
from tests.fakes.campaign_rows import append, files, spec, store


class Disk:
    """The system calls of a disk that can be made to fail. Writes that fail have written a part."""

    def __init__(self) -> None:
        self.refuse: int | None = None
        self.at = "write"
        self.only = ""  # the file it concerns; empty: all

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _fails(self, handle: int, call: str) -> bool:
        return self.refuse is not None and self.at == call and os.readlink(f"/proc/self/fd/{handle}").endswith(self.only)

    def write(self, handle: int, data: bytes) -> int:
        if self._fails(handle, "write"):
            os.write(handle, data[:10])
            raise OSError(self.refuse, os.strerror(self.refuse or 0))
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        if self._fails(handle, "fsync"):
            raise OSError(self.refuse, os.strerror(self.refuse or 0))
        os.fsync(handle)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(rowfile, "os", made)
    return made


class Watched(Store):
    """A store that keeps what it has said, and calls `mend` when it pauses."""

    def __init__(self, mend: Callable[[], object] = lambda: None) -> None:
        self.said: list[str] = []
        self.mend = mend
        super().__init__(files(), spec(), "1", on_pause=self._paused, on_resume=lambda: self.said.append("resumed"))

    def _paused(self, error: StoreError) -> None:
        self.said.append(str(error))
        self.mend()


def ids(name: str) -> list[str]:
    path = files().path / name
    assert path.read_bytes().endswith(b"\n")
    return [str(row.get("id", row.get("task_id"))) for row in read_lines(path)]


async def several(opened: Store, first: int, count: int) -> None:
    async with anyio.create_task_group() as group:
        for number in range(first, first + count):
            group.start_soon(append, opened, number)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs to know which file a handle is of")
@pytest.mark.parametrize("refuse", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("only", ["samples.jsonl", "calls.jsonl"])
@pytest.mark.parametrize("at", ["write", "fsync"])
def test_it_waits_until_the_disk_takes_lines_again(disk: Disk, refuse: int, only: str, at: str) -> None:
    def mend() -> None:
        disk.refuse = None

    with Watched(mend) as opened:
        anyio.run(append, opened, 0)
        disk.refuse, disk.only, disk.at = refuse, only, at
        anyio.run(several, opened, 1, 5)
        assert opened.tally.calls == 6
    assert len(opened.said) == 2
    assert only in opened.said[0]
    assert opened.said[1] == "resumed"
    assert sorted(ids("samples.jsonl")) == sorted(ids("calls.jsonl")) == [f"t{number}" for number in range(6)]


def test_giving_up_ends_the_wait_and_the_next_start_has_all_that_was_acknowledged(disk: Disk) -> None:
    refused: list[int] = []

    async def one(opened: Store, number: int) -> None:
        try:
            await append(opened, number)
        except DiskFull:
            refused.append(number)

    async def work(opened: Store) -> None:
        async with anyio.create_task_group() as group:
            for number in range(1, 6):
                group.start_soon(one, opened, number)

    with Watched() as opened:
        anyio.run(append, opened, 0)
        disk.refuse, disk.only = errno.ENOSPC, "calls.jsonl"
        opened.mend = opened.give_up
        anyio.run(work, opened)
        with pytest.raises(DiskFull):
            anyio.run(append, opened, 6)
    assert sorted(refused) == list(range(1, 6))
    assert opened.said == [opened.said[0]]
    assert ids("calls.jsonl") == ["t0"]
    disk.refuse = None
    with store() as again:  # the rows that got there are owed their call lines, and get them
        assert again.tally.calls == 6
    assert ids("calls.jsonl") == ids("samples.jsonl")


@pytest.mark.parametrize("refuse", [errno.EFBIG, errno.EBADF])
def test_what_waiting_cannot_mend_stops_at_once(disk: Disk, refuse: int) -> None:
    with Watched() as opened:
        disk.refuse = refuse
        with pytest.raises(StoreError, match="samples.jsonl"):
            anyio.run(append, opened, 0)
    assert opened.said == []


def test_an_error_of_our_own_is_believed_by_nobody(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []

    async def one(opened: Store, number: int) -> None:
        try:
            await append(opened, number)
        except Exception as error:
            failed.append(type(error).__name__)

    async def work(opened: Store) -> None:
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(one, opened, number)

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with store() as opened:
        monkeypatch.setattr(opened._calls, "append", broken)
        anyio.run(work, opened)
    assert sorted(failed) == ["RuntimeError", "StoreError", "StoreError", "StoreError"]
    with store() as opened:
        assert opened.tally.calls == 4, "rows that were written are owed their calls"


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Take the campaign's folder away, and put it back."""
    away = tmp_path / "away"
    yield (lambda: os.rename(files().path, away)), (lambda: os.rename(away, files().path))


@pytest.mark.skipif(os.name != "posix", reason="Windows does not move what is open")
def test_a_folder_that_was_moved_away_is_waited_for(moved: tuple[Callable[[], None], Callable[[], None]]) -> None:
    take, put_back = moved
    with Watched(put_back) as opened:
        anyio.run(append, opened, 0)
        take()
        anyio.run(several, opened, 1, 3)
    assert len(opened.said) == 2
    assert "no longer there" in opened.said[0] or "No such file" in opened.said[0]
    assert ids("samples.jsonl") == ids("calls.jsonl") == [f"t{number}" for number in range(4)]


@pytest.mark.skipif(os.name != "posix", reason="Windows does not remove what is open")
def test_a_folder_that_held_nothing_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    with Watched() as opened:
        shutil.rmtree(files().path)
        monkeypatch.setattr(store_module, "sync_folder", lambda folder: (synced.append(folder), sync_folder(folder)))
        anyio.run(several, opened, 0, 3)
        assert files().path.parent in synced, "a power cut would take the new folder's name"
        with pytest.raises(StoreError, match="being written by process"), store():
            pass
    assert opened.said[1:] == ["resumed"]
    assert files().spec.exists()
    assert ids("samples.jsonl") == ids("calls.jsonl") == ["t0", "t1", "t2"]


@pytest.mark.skipif(os.name != "posix", reason="Windows does not remove what is open")
@pytest.mark.parametrize("how", ["removed", "replaced", "emptied"])
def test_rows_that_vanish_are_said_to_be_gone(how: str) -> None:
    path = files().samples
    with Watched() as opened:
        anyio.run(append, opened, 0)
        if how == "emptied":  # a folder came back, but not with what was in it
            opened.mend = lambda: (files().path.mkdir(), path.write_bytes(b"{}\n"))
            shutil.rmtree(files().path)
        else:
            path.unlink()
            if how == "replaced":
                path.write_bytes(b"other\n")
        with pytest.raises(StoreError, match="samples.jsonl was (removed|changed by somebody else)"):
            anyio.run(append, opened, 1)
    assert len(opened.said) == 1
