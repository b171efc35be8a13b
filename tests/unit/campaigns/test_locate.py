"""A job is found by id, by the start of one and by name, over several nodes."""

from pathlib import Path

import pytest

from campaigns import locate
from campaigns.locate import find, jobs_at, node_of
from campaigns.sync.survey import NodeState, Seen
from config.contracts.job import JobState, JobView
from config.errors import JobNotFound, NodeUnreachable
from config.settings import LOCAL, Settings


def view(id_: str, name: str, created_at: float, state: JobState = JobState.QUEUED) -> JobView:
    return JobView(id=id_, kind="sft", name=name, state=state, created_at=created_at, updated_at=created_at)


OFF = NodeUnreachable("off")
STATES = [
    NodeState("a", Seen(at=9, jobs=[view("sft-0002-aaaa", "coder", 5), view("sft-0001-bbbb", "old", 1)])),
    NodeState("b", Seen(at=7, jobs=[view("sft-0001-cccc", "coder", 6, JobState.SUCCEEDED)]), OFF),
]


@pytest.mark.parametrize(
    ("text", "node", "id_"),
    [
        ("sft-0001-bbbb", "a", "sft-0001-bbbb"),
        ("sft-0002", "a", "sft-0002-aaaa"),
        ("coder", "b", "sft-0001-cccc"),  # the newest of that name, though its node is silent
        ("", "a", "sft-0002-aaaa"),  # the newest that has not ended
    ],
)
def test_what_a_text_means(text: str, node: str, id_: str) -> None:
    at = find(STATES, text)
    assert (at.node, at.job.id) == (node, id_)
    assert at.unknown_since == (7 if node == "b" else None)


def test_the_newest_comes_first() -> None:
    assert [at.job.created_at for at in jobs_at(STATES)] == [6, 5, 1]


def test_an_ambiguous_start_names_the_jobs() -> None:
    with pytest.raises(JobNotFound, match='"sft-0001" means 2 jobs') as raised:
        find(STATES, "sft-0001")
    assert "sft-0001-cccc on b" in raised.value.hint and "sft-0001-bbbb on a" in raised.value.hint


def test_a_job_that_is_nowhere_names_the_nodes_that_were_not_asked() -> None:
    with pytest.raises(JobNotFound, match=r'no job "x"; not asked: b \(off\)'):
        find(STATES, "x")
    with pytest.raises(JobNotFound, match="no jobs yet"):
        find([], "")


def test_one_node_alone_is_not_asked_where_a_job_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "survey", None)
    assert node_of(Settings(home=home), "x") == (LOCAL, "x")
    assert node_of(Settings(home=home), "x", "box") == ("box", "x")
