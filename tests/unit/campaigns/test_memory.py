"""Holes in the heap are given back where the C library keeps them."""

import platform
from pathlib import Path

import pytest

from campaigns.memory import trimmer


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_holes_are_given_back() -> None:
    trim = trimmer()
    assert trim is not None
    buffers = [bytearray(32_000) for _ in range(2000)]
    full = resident_mb()
    del buffers[1::2]
    trim(0)
    assert resident_mb() < full - 20
