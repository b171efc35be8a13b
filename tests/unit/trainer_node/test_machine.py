"""Limits of a container: as the kernel's two versions of control groups tell them, and in a real group of this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from trainer_node import machine

GIB = 2**30
REAL = Path("/sys/fs/cgroup/memory")  # version 1, where a test may make groups


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=64 * GIB, available=48 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cgroup"


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def seen() -> tuple[float, float, int]:
    return machine.total_memory() / GIB, machine.free_memory() / GIB, machine.cores()


def own(groups: Path, *lines: str) -> None:
    groups.with_name("own").write_text("".join(f"{line}\n" for line in lines))


def test_a_machine_without_groups_has_what_it_has(groups: Path) -> None:
    assert seen() == (64, 48, 32)
    own(groups, "0::/")
    assert seen() == (64, 48, 32)


@pytest.mark.parametrize(("wanted", "count"), [("3", 3), ("4,2", 4), ("64", 32), ("0", 1), ("all", 32), ("", 32)])
def test_openmp_may_be_told_to_use_fewer(wanted: str, count: int, groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert machine.cores() == count


def test_version_2_in_a_container_and_under_a_service_manager(groups: Path) -> None:
    own(groups, "0::/node.slice/hafs.service")
    write(groups, cgroup__procs="")
    slice_, service = groups / "node.slice", groups / "node.slice/hafs.service"
    write(service, memory__max="max", memory__current=GIB, memory__stat="anon 5", cpu__max="max 100000")
    assert seen() == (64, 48, 32)
    stat = f"anon 12\ninactive_file {2 * GIB}\nactive_file {GIB}\nshmem 3"
    write(slice_, memory__max=16 * GIB, memory__current=10 * GIB, memory__stat=stat, cpu__max="250000 100000")
    assert seen() == (16, 9, 3), "of the group around it; cached files make way"
    write(service, memory__max=4 * GIB, memory__current=5 * GIB, memory__stat="", cpu__max="50000 100000")
    assert seen() == (4, 0, 1)
    own(groups, "0::/docker/0123abc")  # the host's name for it; its own group is shown as the outermost
    write(groups, memory__max=8 * GIB, memory__current=2 * GIB, memory__stat="inactive_file 0", cpu__max="400000 100000")
    assert seen() == (8, 6, 4)


def test_version_1(groups: Path) -> None:
    own(groups, "4:memory:/docker/0123abc", "3:cpuset:/", "2:cpu,cpuacct:/docker/0123abc", "0::/")
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file 0"
    write(groups / "memory", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=3 * GIB, memory__stat=stat)
    write(groups / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert seen() == (8, 6, 32)
    write(groups / "cpu", cpu__cfs_quota_us=150000)
    assert seen() == (8, 6, 2)
    write(groups / "memory", memory__limit_in_bytes=9223372036854771712)
    assert seen() == (64, 48, 2), "a limit that is none"


@pytest.fixture
def real_group() -> Iterator[Path]:
    folder = REAL / f"hafs-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no groups of version 1 can be made here: {error}")
    yield folder
    folder.rmdir()


def test_a_real_group(real_group: Path) -> None:
    (real_group / "memory.limit_in_bytes").write_text(str(GIB))
    code = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()));"
        "from trainer_node import machine; held = bytearray(256 << 20); print(machine.total_memory(), machine.free_memory())"
    )
    argv = [sys.executable, "-c", code, str(real_group / "cgroup.procs")]
    total, free = map(int, subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    assert total == GIB and 0.5 * GIB < free <= 0.75 * GIB
