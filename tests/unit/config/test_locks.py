import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import StoreError, StoreHeld
from config.locks import FileLock, Instant, alone, holder


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "deep" / "lock"), FileLock(tmp_path / "deep" / "lock")
    assert first.acquire() and not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
    first.release()


def test_a_crash_frees_it_and_its_text_stays_harmless(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import sys; from pathlib import Path; from config.locks import FileLock\n"
        f"lock = FileLock(Path({str(path)!r})); assert lock.acquire(); lock.sign(); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    assert holder(path) == child.pid
    child.kill()
    child.communicate()
    assert holder(path) is None and path.read_text().strip() == str(child.pid)


def test_looks_disturb_neither_each_other_nor_the_next_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None and not path.exists()
    path.touch()
    assert holder(path) is None and holder(path) is None
    with alone(path), pytest.raises(StoreHeld, match="held for"), alone(path, deadline_s=0.1):
        pass
    assert holder(path) is None


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        FileLock(tmp_path / "file" / "lock").acquire()


def test_an_instant_is_one_holders_at_a_time_and_ends_with_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import os, sys; from config.locks import Instant\n"
        f"with Instant(os.open({str(path)!r}, os.O_RDWR)): print('held', flush=True); sys.stdin.read()"
    )
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    with Instant(handle):
        child = subprocess.Popen([sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holder(path) is not None
    assert child.stdout is not None and child.stdout.readline() == b"held\n", "it came in once the lock was free"
    assert holder(path) is not None
    child.kill()
    child.communicate()
    with Instant(handle):
        assert holder(path) is not None
    assert holder(path) is None
    os.close(handle)
