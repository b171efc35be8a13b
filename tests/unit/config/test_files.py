"""Atomic files."""

from pathlib import Path

import pytest

from config.errors import StoreError
from config.files import write_atomic


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
