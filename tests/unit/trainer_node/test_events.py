import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from config.contracts.job import JobSpec, JobState, TrainJob
from config.contracts.wire import EventsArgs, EventsResult, Reply
from config.locks import FileLock
from tests.fakes.fake_processes import FakeRunner
from trainer_node.daemon import lock_file
from trainer_node.events import read_events
from trainer_node.jobdir import JobDir
from trainer_node.queue import Queue
from trainer_node.rpc import Service


def submit(queue: Queue, nonce: str) -> str:
    spec = JobSpec(kind="sft", name="coder", base="x", data=["d"])
    return queue.submit(TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce=nonce), lambda *_: None)[0].id


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    """Of a root whose daemon is this test."""
    lock = FileLock(lock_file(tmp_path))
    assert lock.acquire()
    lock.sign()
    with closing(Queue(tmp_path)) as queue:
        yield queue
    lock.release()


def ask(root: Path, verb: str, **args: object) -> Reply:
    service = Service(root)
    try:
        return service.answer(json.dumps({"verb": verb, "args": args}).encode())
    finally:
        service.close()


def test_who_asks_with_the_last_number_misses_nothing(queue: Queue, tmp_path: Path) -> None:
    first = submit(queue, "1")
    reply = ask(tmp_path, "events")
    seen = EventsResult.model_validate(reply.result)
    assert [(event.seq, event.job, event.state) for event in seen.events] == [(1, first, JobState.QUEUED)] and seen.next == 1
    assert EventsResult.model_validate(ask(tmp_path, "events", after=1).result) == EventsResult(events=[], next=1)
    second = submit(queue, "2")
    [event] = EventsResult.model_validate(ask(tmp_path, "events", after=seen.next).result).events
    assert event.job == second


def test_a_question_waits_for_an_answer(queue: Queue, tmp_path: Path) -> None:
    def later() -> None:
        with closing(Queue(tmp_path)) as other:
            submit(other, "1")

    thread = threading.Timer(0.05, later)
    thread.start()
    assert len(read_events(queue, EventsArgs(wait_s=20)).events) == 1
    thread.join()


def test_retry_over_the_wire(queue: Queue, tmp_path: Path) -> None:
    id_ = submit(queue, "1")
    queue.end(id_, JobState.CANCELLED)
    for _ in range(2):
        reply = ask(tmp_path, "retry", job=id_)
        assert reply.result is not None and reply.result["jobs"][0]["state"] == "QUEUED"
    assert [event.state for event in queue.events(id_)] == ["QUEUED", "CANCELLED", "QUEUED"]
    for job, code in (("", "JobNotFound"), ("nobody", "JobNotFound")):
        error = ask(tmp_path, "retry", job=job).error
        assert error is not None and error.code == code


def test_a_daemon_on_its_way_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[FakeRunner] = []

    def start(*_: object, **__: object) -> FakeRunner:
        started.append(FakeRunner(len(started), JobDir(tmp_path), 0, "cpu", ""))
        return started[-1]

    monkeypatch.setattr("trainer_node.rpc.start_detached", start)
    with closing(Queue(tmp_path)) as queue:
        submit(queue, "1")
    service = Service(tmp_path)
    for _ in range(3):
        service.answer(b'{"verb": "status"}')
    assert len(started) == 1
    started[0].code = 21  # it found another one there, which has gone since
    service.answer(b'{"verb": "status"}')
    assert len(started) == 2
    service.close()
