"""What a process may use of its machine: a rented GPU is mostly a container, whose limits neither psutil nor os know.

Of Linux's control groups the tightest of the process's own group and of all around it counts, version 1 and 2. A file that is not
there, or not readable, sets no limit.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# Of version 2 and of 1: limit, use, and in memory.stat what of it is files that make way; version 1 counts groups inside apart.
MEMORY_FILES = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
CPU_FILES = (("cpu.max", "cpu.max"), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # quota and period, in µs


def total_memory() -> int:
    """Bytes that there are at most."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """Bytes that can be allocated now."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _memory_limits())]))


def cores() -> int:
    """Cores that can be kept busy at once, a part of one counting as one; no more than OMP_NUM_THREADS, as for torch."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, min([count, *map(math.ceil, _cpu_limits()), *([int(wanted)] if wanted.isdecimal() else [])]))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Bytes allowed, and those in use that do not make way."""
    for folder in _groups("memory"):
        for limit_name, used_name, prefix in MEMORY_FILES:
            limit, used = _words(folder / limit_name), _words(folder / used_name)
            if limit and limit[0].isdigit() and used:
                words = _words(folder / "memory.stat")
                stat = dict(zip(words[::2], map(int, words[1::2]), strict=False))
                files = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
                yield int(limit[0]), int(used[0]) - files


def _cpu_limits() -> Iterator[float]:
    for folder in _groups("cpu"):
        for quota_name, period_name in CPU_FILES:
            quota, period = _words(folder / quota_name), _words(folder / period_name)
            if quota and period and quota[0].isdigit():  # not "max", not -1
                yield int(quota[0]) / int(period[-1])


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the process's group and of those around it. In a container its own is shown as the outermost."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") or not controllers:
            root = GROUPS / controller if controllers else GROUPS
            own = root / path.lstrip("/")
            yield own
            yield from (folder for folder in own.parents if folder.is_relative_to(root))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
