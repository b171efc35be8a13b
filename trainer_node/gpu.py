"""What this machine's first GPU is doing, by NVIDIA's management library (NVML), and whether a training job has it.

- Nothing is made up: without NVML there is no utilization, and where the system tells no processes apart (Windows consumer
  cards) the model server's own share is None.
- A lease is known without NVML, too: it is the job whose runner lives, so a job that a crash has left behind leases nothing.
- A driver that goes (an update, a card that fell off the bus) is asked again at the next look.
"""

import time
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from config.contracts.gpu import GpuReading
from config.contracts.wire import GpuResult
from trainer_node.jobdir import JobDir
from trainer_node.processes import ProcessId, alive
from trainer_node.queue import Queue

_WINDOW_S = 1.5  # processes' samples are taken over about a second
_SERVERS = ("ollama", "llama-server", "ollama_llama_server")  # a model server's processes by name …
_RUNTIME = ("trainer_node.cli", "runtime")  # … and words of hafs's own one's command line


def read_gpu(root: Path) -> GpuReading | None:
    """The first GPU now; None where nothing is known of it. Without NVML that is a reading of source "queue" while a job has
    the machine to itself: its utilization is not known, and does not matter then.
    """
    return look(root).reading


def look(root: Path) -> GpuResult:
    """As `read_gpu`, with the reason where there is no reading."""
    leased_to = leaseholder(root)
    try:
        import pynvml
    except ModuleNotFoundError:
        return _without_nvml(leased_to, "the package nvidia-ml-py is not installed")
    try:
        _begin()
        return GpuResult(reading=_read(pynvml, leased_to))
    except pynvml.NVMLError as error:
        _begin.cache_clear()
        with suppress(pynvml.NVMLError):  # it may not even have begun
            pynvml.nvmlShutdown()
        return _without_nvml(leased_to, str(error))


@cache
def _begin() -> None:
    """Once a process: it takes the driver a while."""
    import pynvml

    pynvml.nvmlInit()


def leaseholder(root: Path) -> str:
    """The id of the job that is being trained in this root now; empty: none."""
    if not (root / "state.sqlite").exists():
        return ""
    with closing(Queue(root)) as queue:
        for job in queue.owed():
            record = JobDir(root / "jobs" / job.id).runner(job.attempt) if job.state.active else None
            if record is not None and alive(ProcessId(record.pid, record.create_time, record.boot_id)):
                return job.id
    return ""


def _without_nvml(leased_to: str, missing: str) -> GpuResult:
    reading = GpuReading(utilization=0, leased_to=leased_to, source="queue") if leased_to else None
    return GpuResult(reading=reading, missing=missing)


def _read(nvml: ModuleType, leased_to: str) -> GpuReading:
    device = nvml.nvmlDeviceGetHandleByIndex(0)
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    return GpuReading(
        utilization=nvml.nvmlDeviceGetUtilizationRates(device).gpu,
        own_share=_own_share(nvml, device),
        memory_used_bytes=memory.used,
        memory_total_bytes=memory.total,
        holder=_holder(nvml, device),
        leased_to=leased_to,
        source="nvml",
    )


def _own_share(nvml: ModuleType, device: Any) -> float | None:
    """Utilization in % that model servers cause; None where the system does not tell processes apart."""
    try:
        samples = nvml.nvmlDeviceGetProcessUtilization(device, int((time.time() - _WINDOW_S) * 1e6))
    except nvml.NVMLError as error:
        # With no process at work some drivers say "not found", others "success" and no list.
        return 0.0 if error.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_SUCCESS) else None
    by_process: dict[int, list[int]] = {}
    for sample in samples:
        by_process.setdefault(sample.pid, []).append(sample.smUtil)
    return min(100.0, sum(sum(shares) / len(shares) for pid, shares in by_process.items() if _is_server(pid)))


def _holder(nvml: ModuleType, device: Any) -> str:
    """The name of the process with most of the memory; empty where no process is seen, or none's memory."""
    processes = []
    for listing in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            processes += listing(device)
        except nvml.NVMLError_NotSupported:
            continue
    biggest = max(processes, key=lambda process: process.usedGpuMemory or 0, default=None)
    return _name_and_command(biggest.pid)[0] if biggest is not None and biggest.usedGpuMemory else ""


def _is_server(pid: int) -> bool:
    name, command = _name_and_command(pid)
    stem = name.lower().removesuffix(".exe")
    return stem in _SERVERS or all(word in command for word in _RUNTIME)


def _name_and_command(pid: int) -> tuple[str, list[str]]:
    import psutil

    try:
        process = psutil.Process(pid)
        name = process.name()
    except psutil.Error:  # gone, or of another user whose name is not shown
        return "", []
    try:
        return name, process.cmdline()
    except psutil.Error:
        return name, []
