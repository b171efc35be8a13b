"""Several nodes asked at once: those that answer, those that do not, and what is remembered of them."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.sync import survey as module
from campaigns.sync.jobs import submit
from campaigns.sync.remote import Node
from campaigns.sync.survey import ask_all, last_seen, survey
from config.contracts.job import JobSpec, JobState, TrainJob
from config.errors import NodeUnreachable
from config.settings import LOCAL, Settings
from tests.fakes.in_process_node import InProcessNode
from trainer_node.jobdir import JobDir
from trainer_node.queue import Queue

SPEC = JobSpec(kind="sft", name="coder", base="package:none", data=["demo"])


class Fleet:
    """Nodes by name, in this process. A node of `silent` is waited for; one of `off` refuses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.silent: dict[str, threading.Event] = {}
        self.off: set[str] = set()

    def node(self, name: str) -> InProcessNode:
        root = self._folder / name
        root.mkdir(exist_ok=True)
        return InProcessNode(root)

    def connect(self, settings: Settings, name: str) -> Node:
        if name in self.off:
            raise NodeUnreachable(f"{name} is off")
        if name in self.silent:
            self.silent[name].wait(30)
        return Node(name, self.node(name).dial)

    def add_job(self, name: str) -> str:
        root = self.node(name).root
        queue = Queue(root)
        job = TrainJob(spec=SPEC, dataset_id="d", code_version="1", nonce=name)
        view, _ = queue.submit(job, lambda id_, made: JobDir(root / "jobs" / id_).write_job(made))
        queue.end(view.id, JobState.CANCELLED)  # nothing is owed, so nobody starts a daemon for it
        queue.close()
        return view.id


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    monkeypatch.setattr(module, "node_named", fleet.connect)
    yield fleet
    for event in fleet.silent.values():
        event.set()


def test_all_answer_and_are_remembered(fleet: Fleet, home: Path) -> None:
    settings, ids = Settings(home=home), {name: fleet.add_job(name) for name in ("a", "b")}
    states = survey(settings, ["a", "b"])
    assert [(state.name, state.seen.jobs[0].id, state.unknown_since) for state in states] == [
        ("a", ids["a"], None),
        ("b", ids["b"], None),
    ]
    assert [last_seen(settings, name).jobs[0].id for name in "ab"] == [ids["a"], ids["b"]]


def test_a_silent_and_a_refusing_node_are_unknown_with_what_they_said_last(
    fleet: Fleet, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, ids = Settings(home=home), [fleet.add_job(name) for name in "abc"]
    before = survey(settings, ["a", "b", "c"], whole=True)
    fleet.silent["a"] = threading.Event()
    fleet.off.add("b")
    monkeypatch.setattr(module, "ANSWER_S", 0.3)
    silent, off, well = survey(settings, ["a", "b", "c"])
    assert "no answer within 0.3 s" in str(silent.problem) and "b is off" in str(off.problem)
    assert (silent.unknown_since, off.unknown_since) == (before[0].seen.at, before[1].seen.at)
    assert [state.seen.jobs[0].id for state in (silent, off, well)] == ids and well.problem is None


def test_a_node_that_never_answered_shows_what_was_sent_to_it(fleet: Fleet, home: Path) -> None:
    settings = Settings(home=home)

    def refuse() -> object:
        raise NodeUnreachable("the answer was lost")

    with pytest.raises(NodeUnreachable):
        submit(settings, Node("b", refuse), SPEC, "a" * 64)  # type: ignore[arg-type]
    fleet.off.add("b")
    [state] = survey(settings, ["b"])
    assert state.unknown_since == 0 and state.seen.jobs[0].name == "coder"
    assert "the answer was lost" in state.seen.jobs[0].detail


def test_a_bug_is_no_silent_node(fleet: Fleet, home: Path) -> None:
    def question(node: Node) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        ask_all(Settings(home=home), ["a"], question)


def test_a_torn_memory_is_none(home: Path) -> None:
    settings = Settings(home=home)
    settings.seen.mkdir(parents=True)
    (settings.seen / "a.json").write_text("{")
    assert last_seen(settings, "a").at == 0


def test_this_machine_is_not_asked_before_it_has_had_a_job(fleet: Fleet, home: Path) -> None:
    fleet.off.add(LOCAL)
    settings = Settings(home=home)
    [state] = survey(settings, [LOCAL])
    assert state.problem is None and state.seen.jobs == []
    settings.node_root.mkdir(parents=True)
    (settings.node_root / "state.sqlite").touch()
    [state] = survey(settings, [LOCAL])
    assert state.problem is not None
