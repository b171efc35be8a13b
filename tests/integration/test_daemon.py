"""A real daemon, real runners, a scripted pipeline: each is killed with kill -9, and nothing is lost or doubled."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from config.contracts import wire
from config.contracts.base import canonical_json
from config.contracts.job import JobSpec, JobView, TrainJob
from config.contracts.manifest import DatasetManifest, Segment
from tests.fakes.waiting import wait_for
from trainer_node.daemon import daemon_pid
from trainer_node.inbox import Inbox
from trainer_node.jobdir import JobDir
from trainer_node.processes import ProcessId, identify, kill_tree
from trainer_node.queue import Queue

pytestmark = pytest.mark.integration
DAEMON = Path(__file__).parents[1] / "fakes" / "daemon.py"
LINES = b'{"id": "a"}\n'


class Node:
    """A root with a dataset; starts daemons, submits scripted jobs, and looks at processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.queue = Queue(root)
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.dataset_id = self._dataset()

    def start(self, idle_exit_s: float | None = None) -> "subprocess.Popen[bytes]":
        extra = [] if idle_exit_s is None else [str(idle_exit_s)]
        argv = [sys.executable, "-P", str(DAEMON), str(self.root), *extra]
        daemon = subprocess.Popen(argv, start_new_session=True)
        self.daemons.append(daemon)
        wait_for("serving daemon", lambda: daemon_pid(self.root) == daemon.pid)
        return daemon

    def job(self, attempts: dict[int, list[str]], nonce: str = "1") -> TrainJob:
        spec = JobSpec(kind="sft", name="coder", base="x", data=["demo"], system=json.dumps(attempts))
        return TrainJob(spec=spec, dataset_id=self.dataset_id, code_version="0", nonce=nonce)

    def submit(self, attempts: dict[int, list[str]], nonce: str = "1") -> str:
        def write(id_: str, job: TrainJob) -> None:
            JobDir(self.root / "jobs" / id_).write_job(job)

        return self.queue.submit(self.job(attempts, nonce), write)[0].id

    def view(self, id_: str) -> JobView:
        return self.queue.get(id_)

    def states(self, id_: str) -> list[str]:
        states = [event.state.value for event in self.queue.events(id_)]
        return [state for n, state in enumerate(states) if n == 0 or states[n - 1] != state]

    def folder(self, id_: str) -> JobDir:
        return JobDir(self.root / "jobs" / id_)

    def runner(self, id_: str, attempt: int = 1) -> ProcessId:
        wait_for(f"runner of attempt {attempt}", lambda: self.folder(id_).runner(attempt))
        record = self.folder(id_).runner(attempt)
        assert record is not None
        return ProcessId(record.pid, record.create_time, record.boot_id)

    def pipeline(self, id_: str, attempt: int = 1) -> int:
        file = self.folder(id_).attempt(attempt) / "pipeline.pid"
        wait_for(f"pipeline of attempt {attempt}", file.exists)
        return int(file.read_text())

    def await_state(self, id_: str, state: str) -> None:
        wait_for(f"{state} of {id_}, which is {self.view(id_)},", lambda: self.view(id_).state == state)

    def clean(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for record in self.root.glob("jobs/*/attempts/*/runner.json"):
            kill_tree(self.runner(record.parents[2].name, int(record.parent.name)))
        self.queue.close()

    def _dataset(self) -> str:
        packed = zstandard.compress(LINES)
        segment = Segment(sha256=hashlib.sha256(packed).hexdigest(), rows=1, bytes=len(LINES), packed_bytes=len(packed))
        inbox = Inbox(self.root)
        inbox.receive(segment, 0, io.BytesIO(packed))
        id_ = inbox.commit_dataset(DatasetManifest(name="demo", campaigns=["demo"], segments=[segment])).id
        inbox.close()
        return id_


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node")
    yield node
    node.clean()


def kill9(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_job_runs_through_its_stages_one_after_the_other(node: Node) -> None:
    steps = ["stage PREPARING", "await go", "stage RUNNING", "await on", "stage EXPORTING", "succeed"]
    first, second = node.submit({1: steps}), node.submit({1: ["succeed"]}, "2")
    node.start()
    wait_for("mirror of the stage", lambda: node.view(first).detail == "preparing…")
    (node.folder(first).path / "go").touch()
    node.await_state(first, "RUNNING")
    assert node.view(second).state == "QUEUED", "one at a time"
    (node.folder(first).path / "on").touch()
    node.await_state(second, "SUCCEEDED")
    assert node.states(first)[:3] == ["QUEUED", "PREPARING", "RUNNING"] and node.states(first)[-2:] == [
        "REGISTERING",
        "SUCCEEDED",
    ]
    result = node.view(first).result
    assert result is not None and (result.model, result.steps) == ("tiny:v1", 7)


def test_an_idle_daemon_takes_up_a_submit(node: Node) -> None:
    node.start()
    id_ = node.submit({1: ["succeed"]})
    wait_for("start of the job", lambda: node.view(id_).state != "QUEUED", 20)


def test_a_failure_says_why_and_is_not_repeated(node: Node) -> None:
    id_ = node.submit({1: ["print loading", "fail GateFailed it answers nonsense"]})
    node.start()
    node.await_state(id_, "FAILED")
    error = node.view(id_).error
    assert error is not None and (error.code, error.message) == ("GateFailed", "it answers nonsense")
    assert node.view(id_).attempt == 1


def test_kill_9_of_the_daemon_and_the_next_one_adopts(node: Node) -> None:
    id_ = node.submit({1: ["stage RUNNING", "await go", "succeed"]})
    daemon = node.start()
    runner, pipeline = node.runner(id_), node.pipeline(id_)
    kill9(daemon.pid)
    daemon.wait()
    assert identify(runner.pid) == runner and identify(pipeline) is not None, "the training goes on"
    node.start()
    wait_for("adoption", lambda: f"adopted: ['{id_}']" in (node.root / "daemon.log").read_text())
    (node.folder(id_).path / "go").touch()
    node.await_state(id_, "SUCCEEDED")
    assert node.view(id_).attempt == 1 and node.runner(id_) == runner


def test_what_ended_while_no_daemon_was_there_is_read_afterwards(node: Node) -> None:
    id_ = node.submit({1: ["await go", "succeed"]})
    daemon = node.start()
    node.pipeline(id_)
    daemon.terminate()
    assert daemon.wait(20) == 0, "SIGTERM: it leaves, and the runner lives on"
    (node.folder(id_).path / "go").touch()
    wait_for("end of the runner by itself", lambda: node.folder(id_).exit(1))
    assert node.view(id_).state == "PREPARING"
    node.start()
    node.await_state(id_, "SUCCEEDED")


def test_kill_9_of_the_runner_kills_the_pipeline_before_the_next_attempt(node: Node) -> None:
    id_ = node.submit({1: ["stubborn"], 2: ["succeed"]})
    node.start()
    pipeline = node.pipeline(id_)
    child_file = node.folder(id_).path / "child.pid"
    wait_for("child of the pipeline", child_file.exists)
    child = int(child_file.read_text())
    kill9(node.runner(id_).pid)
    second = node.pipeline(id_, 2)
    assert identify(pipeline) is None and identify(child) is None and second != pipeline
    node.await_state(id_, "SUCCEEDED")
    assert node.states(id_)[:5] == ["QUEUED", "PREPARING", "INTERRUPTED", "QUEUED", "PREPARING"]


def test_kill_9_of_the_pipeline_goes_on_with_a_new_attempt(node: Node) -> None:
    id_ = node.submit({1: ["stage RUNNING", "checkpoint 20", "await never"], 2: ["await go", "succeed"]})
    node.start()
    wait_for("running job", lambda: node.view(id_).state == "RUNNING")
    kill9(node.pipeline(id_))
    node.pipeline(id_, 2)
    detail = [event.detail for event in node.queue.events(id_) if event.state == "INTERRUPTED"]
    assert len(detail) == 1 and "killed by SIGKILL" in detail[0]
    (node.folder(id_).path / "go").touch()
    node.await_state(id_, "SUCCEEDED")


def test_attempts_without_progress_end_in_failure(node: Node) -> None:
    """A checkpoint between them would have started the count again."""
    id_ = node.submit({1: ["kill"], 2: ["checkpoint 20", "kill"], 3: ["kill"], 4: ["print out of memory", "kill"]})
    node.start()
    node.await_state(id_, "FAILED")
    error = node.view(id_).error
    assert node.view(id_).attempt == 4 and error is not None
    assert "no new checkpoint" in error.message and "out of memory" in error.hint


def test_kill_9_of_all_of_them_at_once(node: Node) -> None:
    id_ = node.submit({1: ["await never"], 2: ["succeed"]})
    daemon = node.start()
    pipeline = node.pipeline(id_)
    for pid in (daemon.pid, node.runner(id_).pid, pipeline):
        kill9(pid)
    daemon.wait()
    node.start()
    node.await_state(id_, "SUCCEEDED")
    assert node.view(id_).attempt == 2


def test_cancel_of_a_running_job_lets_it_save(node: Node) -> None:
    id_ = node.submit({1: ["hang"]})
    node.start()
    node.pipeline(id_)
    node.queue.intend_cancel(id_)
    node.await_state(id_, "CANCELLED")
    exit_ = node.folder(id_).exit(1)
    assert exit_ is not None and exit_.stopped, "by its own hand"


def test_cancel_of_a_deaf_job_kills_the_whole_tree(node: Node) -> None:
    id_ = node.submit({1: ["stubborn"]})
    node.start()
    pipeline = node.pipeline(id_)
    child_file = node.folder(id_).path / "child.pid"
    wait_for("child of the pipeline", child_file.exists)
    node.queue.intend_cancel(id_)
    node.await_state(id_, "CANCELLED")
    assert [identify(pid) for pid in (node.runner(id_).pid, pipeline, int(child_file.read_text()))] == [None] * 3


def test_a_stopped_job_that_nobody_cancelled_goes_on(node: Node) -> None:
    id_ = node.submit({1: ["hang"], 2: ["succeed"]})
    node.start()
    node.pipeline(id_)
    node.folder(id_).stop_file.touch()
    node.await_state(id_, "SUCCEEDED")
    assert node.view(id_).attempt == 2


def test_idle_exit_waits_for_what_is_owed(node: Node) -> None:
    id_ = node.submit({1: ["await go", "succeed"]})
    daemon = node.start(idle_exit_s=0.2)
    node.pipeline(id_)
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.wait(1)
    (node.folder(id_).path / "go").touch()
    assert daemon.wait(20) == 0
    assert node.view(id_).state == "SUCCEEDED" and daemon_pid(node.root) is None


def test_a_submit_over_the_wire_starts_a_daemon_that_outlives_the_connection(node: Node) -> None:
    """The real command, the real runner and the real pipeline: the job fails (there is no base model), and says so."""
    job = node.job({})
    line = canonical_json({"verb": "submit", "args": wire.SubmitArgs(job=job).model_dump(mode="json")}) + b"\n"
    argv = [sys.executable, "-P", "-m", "trainer_node.cli", "rpc", "--root", str(node.root)]
    done = subprocess.run(argv, input=line, capture_output=True, timeout=60, check=True, start_new_session=True)
    reply = wire.Reply.model_validate_json(done.stdout)
    assert reply.result is not None
    wait_for("serving daemon", lambda: daemon_pid(node.root))
    pid = daemon_pid(node.root)
    assert pid and os.getsid(pid) == pid
    try:
        wait_for("end of the job", lambda: node.view(reply.result["job"]["id"]).state.ended)
        error = node.view(reply.result["job"]["id"]).error
        assert error is not None and error.message
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for("leaving", lambda: daemon_pid(node.root) is None)
