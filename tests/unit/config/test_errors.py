"""Every error has an exit code of its own, and the picture at the top of the module is the tree."""

import errno
import re
from pathlib import Path

import pytest

import config.errors as errors
from config.errors import DiskFull, HafsError, StoreError, all_errors, error_named, translate_os_errors


def test_exit_codes_are_unique() -> None:
    codes = [error.exit_code for error in all_errors()]
    assert len(set(codes)) == len(codes)
    assert errors.INTERRUPTED not in codes
    assert 2 not in codes  # typer's own, for wrong arguments


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = dict(re.findall(r"([A-Z]\w+) +(\d+)", errors.__doc__ or ""))
    assert drawn == {error.__name__: str(error.exit_code) for error in all_errors()}


def test_errors_are_found_by_name() -> None:
    assert error_named("DiskFull") is DiskFull
    assert error_named("FromANewerPeer") is HafsError


def test_a_full_disk_is_told_apart() -> None:
    with pytest.raises(DiskFull, match="no space left for /data/x"), translate_os_errors(Path("/data")):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
    with pytest.raises(StoreError, match="cannot write /data: Permission denied"), translate_os_errors(Path("/data")):
        raise OSError(errno.EACCES, "Permission denied")
