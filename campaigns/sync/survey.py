"""What the nodes say, asked at the same time.

A node that does not answer in time is unknown since its last answer, never failed. What it said last is kept on this machine:
one file a node, replaced whole; that it cannot be written is no reason to say nothing.
"""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError

from campaigns.sync.jobs import JobRecord, records
from campaigns.sync.remote import Node, Question, node_named
from config.contracts.base import Tolerant
from config.contracts.job import JobState, JobView
from config.contracts.wire import (
    DATASETS,
    GPU,
    MODELS,
    SERVER,
    STATUS,
    DatasetView,
    GpuResult,
    JobArgs,
    ModelVersion,
    Nothing,
    ServerResult,
)
from config.errors import HafsError, NodeUnreachable, StoreError
from config.files import write_atomic
from config.settings import LOCAL, Settings

ANSWER_S = 5.0  # from the start of connecting to the answer

T = TypeVar("T")


class Seen(Tolerant):
    """What a node said last. `at`: Unix seconds; 0: it never answered."""

    at: float = 0.0
    jobs: list[JobView] = []
    models: list[ModelVersion] = []
    datasets: list[DatasetView] = []


@dataclass(frozen=True)
class NodeState:
    """A node now, or, with a `problem`, as it was when it answered last. `gpu` and `server` are those of now alone."""

    name: str
    seen: Seen
    problem: HafsError | None = None
    gpu: GpuResult = field(default_factory=GpuResult)
    server: ServerResult = field(default_factory=ServerResult)

    @property
    def unknown_since(self) -> float | None:
        """Unix seconds; None: it answered just now."""
        return self.seen.at if self.problem else None

    @property
    def owed(self) -> list[JobView]:
        """Jobs that have not ended, the oldest first."""
        return [job for job in reversed(self.seen.jobs) if not job.state.ended]


def node_names(settings: Settings) -> list[str]:
    """This machine and every node of nodes.toml."""
    return [LOCAL, *settings.nodes()]


def survey(settings: Settings, names: Iterable[str] = (), *, whole: bool = False) -> list[NodeState]:
    """The state of each node, the named ones or all, within `ANSWER_S`. `whole`: with models, data, GPU and server."""
    return surveying(settings, names, whole=whole)()


def surveying(settings: Settings, names: Iterable[str] = (), *, whole: bool = False) -> Callable[[], list[NodeState]]:
    """The same, asked from now on; what it returns waits for the answers."""
    names = list(names) or node_names(settings)
    never_used = not whole and not (settings.node_root / "state.sqlite").exists()
    asked = [name for name in names if not (name == LOCAL and never_used)]  # no process is started to say that there is nothing
    answers = asking(settings, asked, _all_of if whole else _jobs_of, ANSWER_S)

    def states() -> list[NodeState]:
        said = answers()
        return [
            _state(settings, name, said[name], whole) if name in said else NodeState(name, Seen(at=time.time())) for name in names
        ]

    return states


def ask_all(
    settings: Settings, names: Iterable[str], question: Callable[[Node], T], deadline_s: float = ANSWER_S
) -> dict[str, T | HafsError]:
    """The answer of each node, or why there is none. Each is asked in a thread; one that hangs is left behind."""
    return asking(settings, names, question, deadline_s)()


def asking(
    settings: Settings, names: Iterable[str], question: Callable[[Node], T], deadline_s: float
) -> Callable[[], dict[str, T | HafsError]]:
    """The same, asked from now on; what it returns waits for the answers."""
    names = list(names)
    answers: queue.SimpleQueue[tuple[str, T | Exception]] = queue.SimpleQueue()
    if set(names) - {LOCAL}:
        importlib.import_module("campaigns.sync.ssh")  # first: what the threads and this one load at once hinders each other

    def ask(name: str) -> None:
        try:
            with node_named(settings, name) as node:
                answers.put((name, question(node)))
        except Exception as error:  # handed on to the thread that asked for it
            answers.put((name, error))

    for name in names:
        threading.Thread(target=ask, args=(name,), daemon=True).start()
    end = time.monotonic() + deadline_s
    return lambda: _collected(names, answers, end, deadline_s)


def _collected(
    names: list[str], answers: "queue.SimpleQueue[tuple[str, T | Exception]]", end: float, deadline_s: float
) -> dict[str, T | HafsError]:
    late = NodeUnreachable(f"no answer within {deadline_s:g} s", hint="is it on? hafs nodes doctor NAME says more")
    found: dict[str, T | HafsError] = dict.fromkeys(names, late)
    for _ in names:
        try:
            name, answer = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(answer, Exception) and not isinstance(answer, HafsError):
            raise answer
        found[name] = answer
    return found


def remember(settings: Settings, name: str, seen: Seen) -> None:
    """Keep what a node said."""
    try:
        write_atomic(settings.seen / f"{name}.json", seen.model_dump_json().encode())
    except StoreError:  # a full disk: the next outage shows an older state
        return


def last_seen(settings: Settings, name: str) -> Seen:
    """What a node said last, with the jobs that this machine sent it since."""
    try:
        seen = Seen.model_validate_json((settings.seen / f"{name}.json").read_bytes())
    except (OSError, ValidationError):  # none, or torn by hand: it is a copy of what the node has
        seen = Seen()
    known = {job.id for job in seen.jobs}
    sent = [_as_sent(record) for record in reversed(records(settings)) if record.node == name and record.job_id not in known]
    return seen.model_copy(update={"jobs": [*sent, *seen.jobs]})


def _jobs_of(node: Node) -> NodeState:
    (found,) = node.ask([(STATUS, JobArgs())], ANSWER_S)
    return NodeState(node.name, Seen(at=time.time(), jobs=found.jobs))


def _all_of(node: Node) -> NodeState:
    nothing = Nothing()
    questions: list[Question] = [(STATUS, JobArgs()), (MODELS, nothing), (DATASETS, nothing), (GPU, nothing), (SERVER, nothing)]
    jobs, models, datasets, gpu, server = node.ask(questions, ANSWER_S)
    seen = Seen(at=time.time(), jobs=jobs.jobs, models=models.models, datasets=datasets.datasets)
    return NodeState(node.name, seen, gpu=gpu, server=server)


def _state(settings: Settings, name: str, said: NodeState | HafsError, whole: bool) -> NodeState:
    before = last_seen(settings, name)
    if isinstance(said, HafsError):
        return NodeState(name, before, said)
    kept = {"models": before.models, "datasets": before.datasets}
    remember(settings, name, said.seen if whole else said.seen.model_copy(update=kept))
    return said


def _as_sent(record: JobRecord) -> JobView:
    spec = record.job.spec
    detail = "sent" if record.job_id else "sent, and the answer was lost: submit it again, and it is the same job"
    return JobView(
        id=record.job_id or f"{record.key[:12]}…",
        kind=spec.kind,
        name=spec.name,
        state=JobState.QUEUED,
        detail=detail,
        created_at=record.created_at,
        updated_at=record.created_at,
        dataset_id=record.job.dataset_id,
    )
