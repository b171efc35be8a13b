import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pynvml
import pytest

from config.contracts.job import JobResult, JobSpec, JobState, TrainJob
from config.errors import LeaseLost
from config.locks import FileLock, holder
from tests.fakes.fake_processes import FakeProcesses
from trainer_node.daemon import Daemon
from trainer_node.jobdir import Exit, JobDir, Stage
from trainer_node.leases import device_lock, devices, environment
from trainer_node.queue import Queue


def submit(queue: Queue, root: Path, nonce: str = "1", after: str = "") -> str:
    spec = JobSpec(kind="sft", name="coder", base="x", data=["d"])
    job = TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce=nonce, after=after)
    return queue.submit(job, lambda id_, job: JobDir(root / "jobs" / id_).write_job(job))[0].id


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("0", ["gpu0"]),
        ("2, 0", ["gpu2", "gpu0"]),
        ("", ["cpu"]),
        ("-1", ["cpu"]),
        ("1,-1,0", ["gpu1"]),
        ("GPU-8a7/x", ["gpuGPU-8a7/x"]),
    ],
)
def test_what_cuda_may_see_is_what_is_leased(visible: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices() == found


def test_the_driver_counts_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"Init": None, "Shutdown": None, "DeviceGetCount": 2}.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda value=value: value)
    assert devices() == ["gpu0", "gpu1"]
    assert environment("gpu1") == {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def no_driver() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert devices() == ["cpu"] and environment("cpu") == {}


def test_a_lock_file_stays_in_its_folder(tmp_path: Path) -> None:
    assert device_lock(tmp_path, "gpu../../MIG/1").parent == tmp_path / "leases"


def test_two_gpus_train_two_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    processes = FakeProcesses()
    with closing(Queue(tmp_path)) as queue:
        ids = [submit(queue, tmp_path, nonce) for nonce in "123"]
        daemon = Daemon(tmp_path, processes=processes)
        daemon.step(queue)
        assert [(runner.folder.id, runner.device) for runner in processes.runners] == [(ids[0], "gpu0"), (ids[1], "gpu1")]
        processes.runners[1].begin()
        processes.runners[1].end("success")
        daemon.step(queue)
        assert queue.get(ids[1]).state is JobState.SUCCEEDED
        daemon.step(queue)
        assert (processes.runners[2].folder.id, processes.runners[2].device) == (ids[2], "gpu1")


def test_what_was_given_up_writes_nothing_more(tmp_path: Path) -> None:
    with closing(Queue(tmp_path)) as queue:
        id_ = submit(queue, tmp_path)
        queue.begin_attempt(id_)
        old = JobDir(tmp_path / "jobs" / id_, fence=1)
        old.write_stage(1, Stage(state=JobState.RUNNING))
        queue.interrupt(id_, checkpoint=0, why="given up", backoff_s=0)
        queue.requeue_due(1e12)
        queue.begin_attempt(id_)
        new = JobDir(tmp_path / "jobs" / id_, fence=2)
        for write in (lambda: old.write_result(JobResult(model="m:v1")), lambda: old.write_exit(1, Exit(code=0))):
            with pytest.raises(LeaseLost, match="given up"):
                write()
        assert new.result() is None
        new.write_result(JobResult(model="m:v1"))
        queue.end(id_, JobState.CANCELLED)
        with pytest.raises(LeaseLost):
            new.write_exit(2, Exit(code=0))


def test_a_device_that_something_still_holds_is_waited_for(tmp_path: Path) -> None:
    """A lock that the operating system holds says more than a row: what a killed runner started may live on."""
    processes = FakeProcesses()
    with closing(Queue(tmp_path)) as queue:
        id_ = submit(queue, tmp_path)
        lock = FileLock(device_lock(tmp_path, "cpu"))
        assert lock.acquire()
        lock.sign()
        daemon = Daemon(tmp_path, processes=processes)
        daemon.step(queue)
        job = queue.get(id_)
        assert job.state is JobState.QUEUED and f"process {holder(lock.path)}" in job.detail and not processes.runners
        lock.release()
        daemon.step(queue)
        assert queue.get(id_).state is JobState.PREPARING


def test_a_chain_follows_its_first_job(tmp_path: Path) -> None:
    with closing(Queue(tmp_path)) as queue:
        daemon = Daemon(tmp_path, processes=FakeProcesses())
        first = submit(queue, tmp_path)
        second, third = submit(queue, tmp_path, "2", after=first), submit(queue, tmp_path, "3", after="sft-0002")
        queue.begin_attempt(first)
        queue.end(first, JobState.FAILED)
        daemon.step(queue)
        daemon.step(queue)
        for id_, before in ((second, first), (third, second)):
            error = queue.get(id_).error
            assert queue.get(id_).state is JobState.FAILED
            assert error is not None and before in error.message and f"retry {before}" in error.hint
        queue.retry(first), queue.retry(second)
        queue.intend_cancel(first)
        daemon.step(queue)
        daemon.step(queue)
        assert queue.get(second).state is JobState.CANCELLED and "was cancelled" in queue.get(second).detail
        queue.retry(first), queue.retry(second)
        daemon.step(queue)
        assert (queue.get(first).state, queue.get(second).state) == (JobState.PREPARING, JobState.QUEUED)
        queue.end(first, JobState.SUCCEEDED, result=JobResult(model="m:v1"))
        daemon.step(queue)
        assert queue.get(second).state is JobState.PREPARING


def test_children_of_the_holder_hold_the_lock_too(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "cpu.lock")
    assert lock.acquire()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.handle,))
    lock.release()
    assert holder(lock.path) is not None
    child.communicate()
    assert holder(lock.path) is None
