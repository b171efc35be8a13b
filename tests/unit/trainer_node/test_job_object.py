"""The Windows calls, through a kernel32 that only remembers: layout, flags and order are what Windows documents."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from trainer_node.job_object import ExtendedLimits, enclose


class Kernel:
    def __init__(self, refuses: str = "") -> None:
        self.calls = list[tuple[Any, ...]]()
        for name, answer in {
            "CreateJobObjectW": 0x1234,
            "SetInformationJobObject": 1,
            "GetCurrentProcess": 0xFFFF,
            "AssignProcessToJobObject": 1,
        }.items():
            setattr(self, name, self._function(name, 0 if name == refuses else answer))

    def _function(self, name: str, answer: int) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, *args))
            return answer

        return _Function(call)


class _Function(SimpleNamespace):
    def __init__(self, call: Any) -> None:
        super().__init__(call=call)

    def __call__(self, *args: Any) -> int:
        answer: int = self.call(*args)
        return answer


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_void_p) != 8, reason="the sizes of 64-bit Windows")
def test_the_structure_has_the_size_that_windows_checks() -> None:
    assert ctypes.sizeof(ExtendedLimits) == 144
    assert ExtendedLimits.IoInfo.offset == 64 and ExtendedLimits.ProcessMemoryLimit.offset == 112


def test_the_process_is_put_into_a_job_that_dies_with_it() -> None:
    kernel = Kernel()
    assert enclose(kernel)
    assert [call[0] for call in kernel.calls] == [
        "CreateJobObjectW",
        "SetInformationJobObject",
        "GetCurrentProcess",
        "AssignProcessToJobObject",
    ]
    _, job, kind, limits, size = kernel.calls[1]
    assert (job, kind, size) == (0x1234, 9, 144)
    assert limits._obj.BasicLimitInformation.LimitFlags == 0x2000 | 0x0800
    assert kernel.calls[3] == ("AssignProcessToJobObject", 0x1234, 0xFFFF)


@pytest.mark.parametrize("refuses", ["CreateJobObjectW", "SetInformationJobObject", "AssignProcessToJobObject"])
def test_a_refusal_of_windows_is_no_success(refuses: str) -> None:
    assert not enclose(Kernel(refuses))
