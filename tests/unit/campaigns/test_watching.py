"""The pictures of a job: figures as they come, an outage that is told, an attempt that writes its steps again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns import watching as module
from campaigns.sync.remote import Node
from campaigns.watching import pictures
from config.contracts.job import JobState
from config.locks import FileLock
from tests.unit.campaigns.test_sync_jobs import Work
from trainer_node.daemon import lock_file


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    work = Work(tmp_path / "node")
    lock = FileLock(lock_file(tmp_path / "node"))  # held, so that nobody starts a daemon
    assert lock.acquire()
    yield work
    lock.release()
    work.queue.close()


def test_a_job_is_pictured_to_its_end(work: Work) -> None:
    seen = pictures(Node("box", work.node.dial), work.queue.get(work.id))
    first = next(seen)
    assert (first.node, first.job.state, first.metrics, [job.id for job in first.queue]) == (
        "box",
        JobState.QUEUED,
        [],
        [work.id],
    )
    assert first.gpu.reading is None and first.gpu.missing
    work.begin()
    work.measure(1, 2)
    assert [line.step for line in next(seen).metrics] == [1, 2]
    work.measure(3)
    work.queue.end(work.id, JobState.CANCELLED)
    *_, last = seen
    assert last.job.state is JobState.CANCELLED and [line.step for line in last.metrics] == [1, 2, 3]


def test_an_outage_leaves_the_last_picture_marked(work: Work) -> None:
    work.begin()
    work.measure(1)
    node = Node("box", work.node.dial)
    seen = pictures(node, work.queue.get(work.id))
    assert next(seen).unknown is None
    node.close()
    work.node.down = 3
    away = next(seen)
    assert away.unknown is not None and str(away.unknown).startswith("unknown since") and len(away.metrics) == 1
    assert next(seen).unknown is None


def test_an_attempt_that_begins_again_replaces_what_it_repeats(work: Work) -> None:
    work.begin()
    work.measure(1, 2, 3)
    seen = pictures(Node("box", work.node.dial), work.queue.get(work.id))
    assert [line.step for line in next(seen).metrics] == [1, 2, 3]
    work.measure(2, time=100)
    metrics = next(seen).metrics
    assert [(line.step, line.time) for line in metrics] == [(1, 1), (2, 102)]


def test_a_node_that_is_off_from_the_start_is_waited_for(work: Work) -> None:
    work.node.down = 4
    seen = pictures(Node("box", work.node.dial), work.queue.get(work.id))
    assert next(seen).unknown is not None
    assert next(seen).unknown is None
