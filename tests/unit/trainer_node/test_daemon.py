import subprocess
import sys
import time
from pathlib import Path

import pytest

from config.contracts.job import JobError, JobSpec, JobState, TrainJob
from config.errors import StoreHeld
from config.locks import FileLock
from trainer_node.daemon import Daemon, Pace, daemon_pid, lock_file
from trainer_node.jobdir import TRY_AGAIN, Exit, JobDir, RunnerRecord, Stage
from trainer_node.processes import identify_self
from trainer_node.queue import Queue
from trainer_node.train.checkpoints import seal


def a_job(nonce: str = "1") -> TrainJob:
    spec = JobSpec(kind="sft", name="coder", base="x", data=["d"])
    return TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce=nonce)


def dead_runner(folder: JobDir, attempt: int) -> None:
    """A record of a process of an earlier boot."""
    folder.write_runner(RunnerRecord(pid=identify_self().pid, create_time=1.0, boot_id="before", attempt=attempt))


@pytest.fixture
def started(tmp_path: Path) -> tuple[Queue, Daemon, JobDir]:
    """A job that an earlier daemon started, and whose runner a reboot cut off."""
    queue = Queue(tmp_path)
    view, _ = queue.submit(a_job(), lambda id_, job: JobDir(tmp_path / "jobs" / id_).write_job(job))
    queue.begin_attempt(view.id)
    folder = JobDir(tmp_path / "jobs" / view.id)
    dead_runner(folder, 1)
    return queue, Daemon(tmp_path, pace=Pace(backoff_s=1000)), folder


def test_a_reboot_interrupts_and_does_not_fail(started: tuple[Queue, Daemon, JobDir]) -> None:
    queue, daemon, folder = started
    assert daemon.step(queue)
    job = queue.get(folder.id)
    assert job.state is JobState.INTERRUPTED and "cut off" in job.detail
    daemon.step(queue)
    assert queue.get(folder.id).state is JobState.INTERRUPTED, "until the backoff is over"
    queue.close()


@pytest.mark.parametrize(
    ("exit_", "state"),
    [
        (Exit(code=0), JobState.SUCCEEDED),
        (Exit(code=75, stopped=True), JobState.INTERRUPTED),
        (Exit(code=-9), JobState.INTERRUPTED),
        (Exit.model_validate({"code": TRY_AGAIN, "error": {"code": "DiskFull", "message": "full"}}), JobState.INTERRUPTED),
        (Exit.model_validate({"code": 1, "error": {"code": "GateFailed", "message": "no"}}), JobState.FAILED),
        (Exit.model_validate({"code": -6, "error": {"code": "JobFailed", "message": "NaN"}}), JobState.FAILED),
    ],
)
def test_how_an_attempt_ended_decides(started: tuple[Queue, Daemon, JobDir], exit_: Exit, state: JobState) -> None:
    queue, daemon, folder = started
    folder.write_stage(1, Stage(state=JobState.EVALUATING, detail="perplexity"))
    folder.write_exit(1, exit_)
    daemon.step(queue)
    assert queue.get(folder.id).state is state
    assert "EVALUATING" in [event.state for event in queue.events(folder.id)], "the last stage is kept"
    queue.close()


@pytest.mark.parametrize(("code", "state"), [(0, JobState.SUCCEEDED), (75, JobState.CANCELLED), (-9, JobState.CANCELLED)])
def test_a_cancel_that_came_too_late_keeps_the_result(started: tuple[Queue, Daemon, JobDir], code: int, state: JobState) -> None:
    queue, daemon, folder = started
    queue.intend_cancel(folder.id)
    folder.write_exit(1, Exit(code=code, stopped=code == 75))
    daemon.step(queue)
    assert queue.get(folder.id).state is state and queue.cancels() == set()
    queue.close()


def test_waiting_jobs_are_cancelled_at_once(started: tuple[Queue, Daemon, JobDir]) -> None:
    queue, daemon, folder = started
    waiting = queue.submit(a_job("2"), lambda *_: None)[0].id
    queue.intend_cancel(waiting)
    queue.intend_cancel(folder.id)
    daemon.step(queue)
    assert queue.get(waiting).state is JobState.CANCELLED and queue.get(waiting).attempt == 0
    assert queue.get(folder.id).state is JobState.CANCELLED
    assert not daemon.step(queue), "nothing is owed"
    queue.close()


def test_a_torn_stage_file_changes_nothing(started: tuple[Queue, Daemon, JobDir]) -> None:
    queue, daemon, folder = started
    (folder.attempt(1) / "stage.json").write_text('{"state": "RUNN')
    (folder.attempt(1) / "exit.json").write_text('{"co')
    daemon.step(queue)
    assert queue.get(folder.id).state is JobState.INTERRUPTED
    queue.close()


def test_an_attempt_whose_runner_never_came_is_interrupted(tmp_path: Path) -> None:
    """The daemon was killed between its note in the database and the start of the runner."""
    queue = Queue(tmp_path)
    id_ = queue.submit(a_job(), lambda *_: None)[0].id
    queue.begin_attempt(id_)
    patient, daemon = Daemon(tmp_path), Daemon(tmp_path, pace=Pace(start_s=0, backoff_s=1000))
    patient.step(queue)
    assert queue.get(id_).state is JobState.PREPARING, "a runner may be on its way"
    daemon.step(queue)
    daemon.step(queue)
    assert queue.get(id_).state is JobState.INTERRUPTED
    queue.close()


def test_a_runner_that_cannot_work_does_not_hang_the_job(tmp_path: Path) -> None:
    """Another runner still holds the folder: the new one leaves at once, and says nothing."""
    queue = Queue(tmp_path)
    id_ = queue.submit(a_job(), lambda id_, job: JobDir(tmp_path / "jobs" / id_).write_job(job))[0].id
    lock = FileLock(tmp_path / "jobs" / id_ / "runner.lock")
    assert lock.acquire()
    daemon = Daemon(tmp_path, pace=Pace(backoff_s=1000))
    deadline = time.monotonic() + 20
    while queue.get(id_).state is not JobState.INTERRUPTED:
        assert time.monotonic() < deadline
        daemon.step(queue)
        time.sleep(0.02)
    lock.release()
    queue.close()


def test_what_does_not_pass_ends_with_its_own_reason(started: tuple[Queue, Daemon, JobDir]) -> None:
    queue, daemon, folder = started
    seen = []
    for attempt in (1, 2):
        dead_runner(folder, attempt)
        folder.write_exit(attempt, Exit(code=TRY_AGAIN, error=JobError(code="ProviderUnavailable", message=f"away {attempt}")))
        daemon.step(queue)
        seen.append(queue.get(folder.id).state)
        if attempt == 1:
            queue.requeue_due(1e12)
            queue.begin_attempt(folder.id)
    assert seen == [JobState.INTERRUPTED, JobState.FAILED]
    error = queue.get(folder.id).error
    assert error is not None and (error.code, error.message) == ("ProviderUnavailable", "away 2")
    assert "train retry" in error.hint
    queue.close()


def test_a_damaged_checkpoint_is_no_progress_and_is_left_alone(
    started: tuple[Queue, Daemon, JobDir], caplog: pytest.LogCaptureFixture
) -> None:
    queue, daemon, folder = started
    for step in (20, 100):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter.bin").write_bytes(b"whole")
        seal(checkpoint)
    (folder.checkpoints / "checkpoint-100" / "adapter.bin").write_bytes(b"torn")
    with caplog.at_level("INFO", logger="trainer_node.daemon"):
        daemon.step(queue)
    assert (folder.checkpoints / "checkpoint-100").exists()
    assert "checkpoint 20:" in caplog.text
    queue.close()


def test_one_daemon_a_root(tmp_path: Path) -> None:
    assert daemon_pid(tmp_path) is None
    lock = FileLock(lock_file(tmp_path))
    assert lock.acquire()
    assert daemon_pid(tmp_path) == 0, "it has not signed yet"
    lock.sign()
    assert daemon_pid(tmp_path) == identify_self().pid
    with pytest.raises(StoreHeld, match=str(identify_self().pid)):
        Daemon(tmp_path).serve()
    lock.release()
    assert daemon_pid(tmp_path) is None


def test_it_loads_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import trainer_node.cli; from trainer_node.daemon import Daemon, Pace\n"
        f"Daemon(Path({str(tmp_path)!r}), idle_exit_s=0, pace=Pace(tick_s=0.01)).serve()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'httpx', 'aiohttp', 'google'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "idle" in (tmp_path / "daemon.log").read_text()


def test_a_heartbeat_that_stays_away_is_told_once_and_kills_nothing(
    started: tuple[Queue, Daemon, JobDir], caplog: pytest.LogCaptureFixture
) -> None:
    queue, daemon, folder = started
    me = identify_self()
    old = RunnerRecord(pid=me.pid, create_time=me.create_time, boot_id=me.boot_id, attempt=1, heartbeat_at=time.time() - 3600)
    folder.write_runner(old)
    with caplog.at_level("INFO", logger="trainer_node.daemon"):
        daemon.step(queue)
        daemon.step(queue)
    assert queue.get(folder.id).state is JobState.PREPARING
    assert caplog.text.count("no heartbeat") == 1
    queue.close()
