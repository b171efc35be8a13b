"""Atomic files."""

import os
from pathlib import Path

import pytest

from config import files
from config.errors import StoreError
from config.files import replace, write_atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_refused_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(StoreError):
        write_atomic(tmp_path / "file", b"x")
    assert [found.name for found in tmp_path.iterdir() if found.name != "home"] == ["file"]


class Reader:
    """Has the file open for so many looks: Windows refuses to replace it meanwhile."""

    def __init__(self, looks: int) -> None:
        self.looks, self._replace = looks, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        self.looks -= 1
        if self.looks >= 0:
            raise PermissionError(13, "Access is denied", str(source), 5, str(target))
        self._replace(source, target)


def test_on_windows_a_reader_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").write_text("new")
    reader = Reader(3)
    with monkeypatch.context() as windows:
        windows.setattr(files.os, "replace", reader)
        windows.setattr(files.os, "name", "nt")
        replace(tmp_path / "new", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new" and reader.looks == -1


def test_on_windows_a_file_that_stays_open_is_an_error_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").write_text("new")
    with monkeypatch.context() as windows:
        windows.setattr(files, "SHARING_S", 0.1)
        windows.setattr(files.os, "replace", Reader(1000))
        windows.setattr(files.os, "name", "nt")
        with pytest.raises(PermissionError):
            replace(tmp_path / "new", tmp_path / "file")


def test_elsewhere_a_refusal_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(1)
    monkeypatch.setattr(files.os, "replace", reader)
    with pytest.raises(PermissionError):
        replace(tmp_path / "new", tmp_path / "file")
    assert reader.looks == 0
