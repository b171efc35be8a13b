import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from config.contracts.job import JobSpec, TrainJob
from config.locks import FileLock, holder
from tests.fakes.waiting import wait_for
from trainer_node import runner as runner_module
from trainer_node.jobdir import TRY_AGAIN, Exit, JobDir, RunnerRecord
from trainer_node.leases import device_lock
from trainer_node.processes import ProcessId, alive, kill_tree
from trainer_node.queue import Queue
from trainer_node.runner import exit_of, log_tail, runner_argv

PIPELINE = [sys.executable, "-P", str(Path(__file__).parents[2] / "fakes" / "pipeline.py")]
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def folder(tmp_path: Path) -> JobDir:
    folder = JobDir(tmp_path / "jobs" / "sft-0001-aaaa")
    folder.attempt(1).mkdir(parents=True)
    return folder


@pytest.fixture
def start(folder: JobDir) -> Iterator[Start]:
    children: list[subprocess.Popen[bytes]] = []

    def _start(*steps: str, pipeline: list[str] = PIPELINE) -> "subprocess.Popen[bytes]":
        spec = JobSpec(kind="sft", name="coder", base="x", data=["d"], system=json.dumps({"1": steps}))
        folder.write_job(TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce="0"))
        children.append(subprocess.Popen(runner_argv(folder, 1, "cpu", pipeline), stderr=subprocess.PIPE, start_new_session=True))
        return children[-1]

    yield _start
    for child in children:
        if record := folder.runner(1):
            kill_tree(ProcessId(record.pid, record.create_time, record.boot_id))
        child.communicate()


def run(start: Start, folder: JobDir, *steps: str) -> Exit:
    assert start(*steps).wait(30) == 0
    exit_ = folder.exit(1)
    assert exit_ is not None
    return exit_


def test_a_success(start: Start, folder: JobDir) -> None:
    assert run(start, folder, "print step 1", "succeed") == Exit(code=0)
    assert folder.log_file(1).read_bytes() == b"step 1\n"


def test_who_runs_it_is_said_while_it_runs(start: Start, folder: JobDir) -> None:
    runner = start("await go", "succeed")
    wait_for("pipeline", (folder.attempt(1) / "pipeline.pid").exists)
    record = folder.runner(1)
    assert record is not None and record.pid == runner.pid and record.attempt == 1
    assert alive(ProcessId(record.pid, record.create_time, record.boot_id))
    assert folder.exit(1) is None
    pipeline = int((folder.attempt(1) / "pipeline.pid").read_text())
    assert os.getsid(pipeline) == runner.pid, "one session for everything of the job"
    (folder.path / "go").touch()
    assert runner.wait(20) == 0 and folder.exit(1) == Exit(code=0)


def test_an_error_of_the_pipeline_is_handed_on(start: Start, folder: JobDir) -> None:
    exit_ = run(start, folder, "fail GateFailed it answers nonsense")
    assert exit_.code == 1 and exit_.error is not None
    assert (exit_.error.code, exit_.error.message) == ("GateFailed", "it answers nonsense")


def test_an_unexplained_exit_is_explained_with_the_last_lines(start: Start, folder: JobDir) -> None:
    exit_ = run(start, folder, "print loading", "print Killed by a cosmic ray", "exit 3")
    assert exit_.error is not None and exit_.error.code == "JobFailed"
    assert "exit code 3" in exit_.error.message and "cosmic ray" in exit_.error.hint


def test_success_without_a_result_is_none(start: Start, folder: JobDir) -> None:
    exit_ = run(start, folder, "print done")
    assert exit_.error is not None and "without a result" in exit_.error.message


def test_the_stop_file_is_honoured(start: Start, folder: JobDir) -> None:
    runner = start("hang")
    wait_for("pipeline", (folder.attempt(1) / "pipeline.pid").exists)
    folder.stop_file.touch()
    assert runner.wait(20) == 0
    assert folder.exit(1) == Exit(code=75, stopped=True)


def test_a_killed_pipeline_is_no_error_so_it_can_go_on(start: Start, folder: JobDir) -> None:
    assert run(start, folder, "kill") == Exit(code=-9)


def test_a_termination_is_forwarded(start: Start, folder: JobDir) -> None:
    runner = start("await never")
    wait_for("pipeline", (folder.attempt(1) / "pipeline.pid").exists)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(20) == 0
    assert folder.exit(1) == Exit(code=-15)


def test_a_pipeline_that_does_not_start_is_an_error(start: Start, folder: JobDir) -> None:
    assert start(pipeline=["/nonexistent/program"]).wait(20) == 0
    exit_ = folder.exit(1)
    assert exit_ is not None and exit_.error is not None and "cannot start" in exit_.error.message


def test_a_second_runner_touches_nothing(start: Start, folder: JobDir) -> None:
    lock = FileLock(folder.path / "runner.lock")
    assert lock.acquire()
    assert start("succeed").wait(20) != 0
    assert folder.runner(1) is None and folder.exit(1) is None and not folder.log_file(1).exists()
    lock.release()


def test_an_error_file_wins_over_a_crash_at_the_very_end(folder: JobDir) -> None:
    (folder.attempt(1) / "error.json").write_text('{"code": "JobFailed", "message": "loss is NaN"}')
    exit_ = exit_of(folder, 1, -6)
    assert exit_.error is not None and exit_.error.message == "loss is NaN"
    (folder.attempt(1) / "error.json").write_text('{"code": "JobFai')
    assert exit_of(folder, 1, -6).error is None


def test_the_tail_of_a_log_is_short(folder: JobDir) -> None:
    folder.log_file(1).write_bytes(b"x" * 10_000 + b"\n" + b"".join(b"line %d\n" % n for n in range(50)) + b"\xff\n")
    tail = log_tail(folder, 1).splitlines()
    assert len(tail) == 8 and tail[-1] == "�" and tail[-2] == "line 49"


def test_what_may_pass_keeps_its_code_and_its_reason(folder: JobDir) -> None:
    assert exit_of(folder, 1, TRY_AGAIN).error is not None, "a full disk takes no error.json"
    (folder.attempt(1) / "error.json").write_text('{"code": "ProviderUnavailable", "message": "away"}')
    exit_ = exit_of(folder, 1, TRY_AGAIN)
    assert exit_.code == TRY_AGAIN and exit_.error is not None and exit_.error.message == "away"


def test_a_runner_says_now_and_then_that_it_lives(folder: JobDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HEARTBEAT_S", 0.01)
    record = RunnerRecord(pid=1, create_time=1.0, boot_id="b", attempt=1, heartbeat_at=5.0)
    with runner_module._heartbeat(folder, record):
        wait_for("heartbeat", lambda: (seen := folder.runner(1)) is not None and seen.heartbeat_at > 5.0)
    seen = folder.runner(1)
    assert seen is not None and seen.model_copy(update={"heartbeat_at": 5.0}) == record


def test_a_heartbeat_that_cannot_be_written_ends_nothing(
    folder: JobDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner_module, "HEARTBEAT_S", 0.01)
    shutil.rmtree(folder.attempt(1))
    folder.attempt(1).write_bytes(b"a file is in the way")
    record = RunnerRecord(pid=1, create_time=1.0, boot_id="b", attempt=1)
    with runner_module._heartbeat(folder, record):
        wait_for("second warning", lambda: caplog.text.count("no heartbeat") > 1)


def test_a_runner_that_comes_too_late_starts_nothing(folder: JobDir) -> None:
    """Its attempt was given up while it was on its way: the lease of its fence has ended."""
    with closing(Queue(folder.root)) as queue:
        spec = JobSpec(kind="sft", name="coder", base="x", data=["d"], system=json.dumps({"1": ["succeed"]}))
        job = TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce="0")
        id_ = queue.submit(job, lambda id_, job: JobDir(folder.root / "jobs" / id_).write_job(job))[0].id
        queue.begin_attempt(id_)
        queue.interrupt(id_, checkpoint=0, why="its runner did not start", backoff_s=0)
    late = JobDir(folder.root / "jobs" / id_, fence=1)
    late.attempt(1).mkdir(parents=True)
    done = subprocess.run(runner_argv(late, 1, "cpu", PIPELINE), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "LeaseLost" in done.stderr
    assert late.runner(1) is None and late.exit(1) is None and late.result() is None and not late.log_file(1).exists()


def test_the_pipeline_holds_the_device_after_its_runner_was_killed(start: Start, folder: JobDir) -> None:
    runner = start("await go", "succeed")
    wait_for("pipeline", (folder.attempt(1) / "pipeline.pid").exists)
    lock = device_lock(folder.root, "cpu")
    runner.kill()
    runner.wait()
    assert holder(lock) == runner.pid, "free only when the last process is gone"
    (folder.path / "go").touch()
    wait_for("free lock", lambda: holder(lock) is None)
