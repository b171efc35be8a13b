"""What this machine's first GPU is doing, by NVIDIA's management library (NVML), and whether a training job has it.

- "First" as training counts them (trainer_node/leases.py), so CUDA_VISIBLE_DEVICES says which card that is.
- Load is told apart by process: the model server's by name, training's by the session that a runner leads, the rest is foreign.
- Nothing is made up: without NVML there is no utilization, and where the system tells no processes apart (Windows consumer
  cards) the model server's own share is None.
- A lease is known without NVML, too: it is the job whose runner lives, so a job that a crash has left behind leases nothing.
- A driver that goes (an update, a card that fell off the bus) is asked again at the next look.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from config.contracts.gpu import GpuReading
from config.contracts.wire import GpuResult
from trainer_node.jobdir import JobDir
from trainer_node.leases import CPU, devices
from trainer_node.processes import ProcessId, alive, tree
from trainer_node.queue import Queue

_WINDOW_S = 1.5  # processes' samples are taken over about a second
_SERVERS = ("ollama", "llama-server", "ollama_llama_server")  # a model server's processes by name …
_RUNTIME = ("trainer_node.cli", "runtime")  # … and words of hafs's own one's command line
T = TypeVar("T")


def read_gpu(root: Path) -> GpuReading | None:
    """The first GPU now; None where nothing is known of it. Without NVML that is a reading of source "queue" while a job has
    the machine to itself: its utilization is not known, and does not matter then.
    """
    return look(root).reading


def look(root: Path) -> GpuResult:
    """As `read_gpu`, with the reason where there is no reading."""
    device = devices()[0]
    at_work = training(root)
    leased_to = next((each.job for each in at_work if CPU in (device, each.device) or each.device == device), "")
    try:
        return GpuResult(reading=_ask(lambda nvml: _read(nvml, _card(nvml, device), leased_to, at_work)))
    except _Silent as why:
        return _without_nvml(leased_to, str(why))


class CardMemory(NamedTuple):
    """In bytes. `free` includes what this process holds itself. `holder`: who else holds most; "" where that is not known."""

    free: int
    total: int
    holder: str
    holder_pid: int


def card_memory() -> CardMemory | None:
    """Of the first GPU; None where there is none, or the driver does not say."""
    device = devices()[0]
    if device == CPU:
        return None
    try:
        return _ask(lambda nvml: _memory(nvml, _card(nvml, device)))
    except _Silent:
        return None


class _Silent(Exception):
    """NVML does not answer; the message says why."""


def _ask(question: Callable[[ModuleType], T]) -> T:
    try:
        import pynvml
    except ModuleNotFoundError:
        raise _Silent("the package nvidia-ml-py is not installed") from None
    try:
        _begin()
        return question(pynvml)
    except pynvml.NVMLError as error:
        _begin.cache_clear()
        with suppress(pynvml.NVMLError):  # it may not even have begun
            pynvml.nvmlShutdown()
        raise _Silent(str(error)) from error


@cache
def _begin() -> None:
    """Once a process: it takes the driver a while."""
    import pynvml

    pynvml.nvmlInit()


class AtWork(NamedTuple):
    """A job whose runner lives, and the device that is leased to it."""

    job: str
    device: str
    runner: ProcessId


def training(root: Path) -> list[AtWork]:
    """The jobs that are being trained in this root now."""
    if not (root / "state.sqlite").exists():
        return []
    with closing(Queue(root)) as queue:
        leased = {lease.job: lease.device for lease in queue.leases()}
        active = [job for job in queue.owed() if job.state.active]
    found = []
    for job in active:
        record = JobDir(root / "jobs" / job.id).runner(job.attempt)
        runner = ProcessId(record.pid, record.create_time, record.boot_id) if record else None
        if runner is not None and alive(runner):
            found.append(AtWork(job.id, leased.get(job.id, CPU), runner))
    return found


def _card(nvml: ModuleType, device: str) -> Any:
    """The driver's card, by number or by the start of a UUID; the first, where it is named otherwise."""
    name = device.removeprefix("gpu")
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    cards = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    return next((card for card in cards if str(nvml.nvmlDeviceGetUUID(card)).startswith(name)), cards[0])


def _without_nvml(leased_to: str, missing: str) -> GpuResult:
    reading = GpuReading(utilization=0, leased_to=leased_to, source="queue") if leased_to else None
    return GpuResult(reading=reading, missing=missing)


def _memory(nvml: ModuleType, device: Any) -> CardMemory:
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    held = _held(nvml, device)
    own = held.pop(os.getpid(), 0)
    holder = max(held, key=held.__getitem__, default=0)
    return CardMemory(memory.total - memory.used + own, memory.total, _name_and_command(holder)[0] if holder else "", holder)


def _read(nvml: ModuleType, device: Any, leased_to: str, at_work: Sequence[AtWork]) -> GpuReading:
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    shares = _shares(nvml, device)
    trainers = {process.pid for each in at_work for process in tree(each.runner)} if shares else set()
    held = _held(nvml, device)
    holder_pid = max(held, key=held.__getitem__, default=0)
    return GpuReading(
        utilization=nvml.nvmlDeviceGetUtilizationRates(device).gpu,
        own_share=_sum(shares, lambda pid: pid not in trainers and _is_server(pid)),
        training_share=_sum(shares, trainers.__contains__),
        memory_used_bytes=memory.used,
        memory_total_bytes=memory.total,
        holder=_name_and_command(holder_pid)[0] if holder_pid else "",
        holder_pid=holder_pid,
        leased_to=leased_to,
        source="nvml",
    )


def _shares(nvml: ModuleType, device: Any) -> dict[int, float] | None:
    """Utilization in % by process; None where the system does not tell processes apart."""
    try:
        samples = nvml.nvmlDeviceGetProcessUtilization(device, int((time.time() - _WINDOW_S) * 1e6))
    except nvml.NVMLError as error:
        # With no process at work some drivers say "not found", others "success" and no list.
        return {} if error.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_SUCCESS) else None
    by_process: dict[int, list[int]] = {}
    for sample in samples:
        by_process.setdefault(sample.pid, []).append(sample.smUtil)
    return {pid: sum(shares) / len(shares) for pid, shares in by_process.items()}


def _sum(shares: dict[int, float] | None, ours: Callable[[int], bool]) -> float | None:
    return None if shares is None else min(100.0, sum(share for pid, share in shares.items() if ours(pid)))


def _held(nvml: ModuleType, device: Any) -> dict[int, int]:
    """Bytes of its memory by process, as far as processes and their memory are seen."""
    held: dict[int, int] = {}
    for listing in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            held |= {process.pid: process.usedGpuMemory for process in listing(device) if process.usedGpuMemory}
        except nvml.NVMLError_NotSupported:
            continue
    return held


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
