"""Submit a job and watch it. A lost link never reads as a lost job, and a lost answer never makes a second one.

The record of a submit (jobs/<key>.json) is on the disk before anything is sent; whoever sends the same record again, now or
after a crash, gets the same job.
"""

import secrets
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import tenacity
from pydantic import ValidationError

from campaigns.sync.remote import Node, hafs_version
from config.contracts.base import Tolerant
from config.contracts.job import JobSpec, JobView, Metrics, TrainJob
from config.contracts.wire import LOGS, METRICS, SUBMIT, ReadArgs, ReadResult, SubmitArgs, SubmitResult, Verb
from config.errors import NodeUnreachable, StoreCorrupt
from config.files import write_atomic
from config.settings import Settings

SUBMIT_S = 60.0
WAIT_S = 2.0  # one long poll; a change of state without a log line is seen at its end
ANSWER_S = 15.0  # beyond the wait


A = TypeVar("A", bound=Tolerant)
R = TypeVar("R", bound=Tolerant)


class JobRecord(Tolerant):
    """What this laptop sent, or was about to send. `job_id` is None until the node has answered. `created_at`: Unix seconds."""

    key: str
    node: str
    job: TrainJob
    job_id: str | None = None
    created_at: float


@dataclass(frozen=True)
class Order:
    """When a job runs: of those that wait one of a higher priority first, and not before the job `after` (an id) succeeded."""

    priority: int = 0
    after: str = ""


def submit(settings: Settings, node: Node, spec: JobSpec, dataset_id: str, order: Order = Order()) -> SubmitResult:
    """Ask for a new run. Raises NodeUnreachable where the answer was lost: then `pending` finds the record to send again."""
    job = TrainJob(
        spec=spec,
        dataset_id=dataset_id,
        code_version=hafs_version(),
        nonce=secrets.token_hex(16),
        priority=order.priority,
        after=order.after,
    )
    record = JobRecord(key=job.key, node=node.name, job=job, created_at=time.time())
    return send(settings, node, record)


def send(settings: Settings, node: Node, record: JobRecord) -> SubmitResult:
    """Send a record, the first time or again: the answer is the same job, `new` only once."""
    _write(settings, record)
    result = node.call(SUBMIT, SubmitArgs(job=record.job), SUBMIT_S)
    _write(settings, record.model_copy(update={"job_id": result.job.id}))
    return result


def pending(settings: Settings, spec: JobSpec, dataset_id: str, node: str) -> JobRecord | None:
    """The newest record of this spec and dataset at that node, answered or not; to be sent again, or followed."""
    same = [r for r in records(settings) if (r.node, r.job.spec, r.job.dataset_id) == (node, spec, dataset_id)]
    return same[-1] if same else None


def records(settings: Settings) -> list[JobRecord]:
    """Everything this laptop submitted, the oldest first. Raises StoreCorrupt naming the file that is none."""
    found = [_read(path) for path in settings.jobs.glob("*.json")]
    return sorted(found, key=lambda record: (record.created_at, record.key))


@dataclass(frozen=True)
class LogText:
    """What the job printed, whole lines, byte for byte. `attempt` and `offset` are where following goes on after it."""

    data: bytes
    attempt: int
    offset: int


@dataclass(frozen=True)
class MetricsRead:
    """One new line of metrics; of two with the same step the later one holds."""

    metrics: Metrics


@dataclass(frozen=True)
class StateChanged:
    """The first state seen, each new one, and the state after the node was unreachable."""

    job: JobView


@dataclass(frozen=True)
class Unknown:
    """The node does not answer; the job may well go on. `since`: Unix seconds of its last answer."""

    since: float
    reason: str

    def __str__(self) -> str:
        return f"unknown since {time.strftime('%H:%M', time.localtime(self.since))}"


@dataclass(frozen=True)
class Ended:
    job: JobView


FollowEvent: TypeAlias = LogText | MetricsRead | StateChanged | Unknown | Ended


def follow(node: Node, job: str, attempt: int = 0, offset: int = 0) -> Iterator[FollowEvent]:
    """Log text, metrics and states as they come; the last event is `Ended`. It waits for an unreachable node without end.

    Args:
        job: an id, the start of one, or a model name; the job it means now is the one followed.
        attempt: the attempt whose log to go on with, 0 for the newest.
        offset: where in that log.

    Raises:
        JobNotFound: no such job.
    """
    return _Following(node, job, attempt, offset).events()


class Patient:
    """Calls that wait for an unreachable node without end. Each outage is told once."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._answered_at = time.time()
        self.outages = 0

    def call(self, verb: Verb[A, R], args: A, deadline_s: float) -> Generator[Unknown, None, R]:
        """The answer, however long it takes."""
        told = False
        for attempt in tenacity.Retrying(
            wait=tenacity.wait_exponential_jitter(initial=0.2, max=30),
            retry=tenacity.retry_if_exception_type(NodeUnreachable),
        ):
            with attempt:
                answer = self._node.call(verb, args, deadline_s)
                self._answered_at = time.time()
                return answer
            failure = attempt.retry_state.outcome.exception() if attempt.retry_state.outcome else None
            if isinstance(failure, NodeUnreachable) and not told:
                told = True
                self.outages += 1
                yield Unknown(self._answered_at, str(failure))
        raise AssertionError("tenacity tries without end")


class MetricsReader:
    """The new lines of a job's metrics at each read. A new attempt cuts the file back and writes steps again."""

    def __init__(self, patient: Patient, job: str) -> None:
        self._patient, self._args = patient, ReadArgs(job=job)
        self._lines: set[str] = set()

    def read(self, wait_s: float = 0.0) -> Generator[Unknown, None, list[Metrics]]:
        """All that is there now; waits up to `wait_s` for something new."""
        new: list[Metrics] = []
        while True:
            args = self._args.model_copy(update={"wait_s": 0.0 if new else wait_s})
            read = yield from self._patient.call(METRICS, args, args.wait_s + ANSWER_S)
            for line in read.text.splitlines():
                if line not in self._lines:
                    self._lines.add(line)
                    new.append(Metrics.model_validate_json(line))
            before, self._args = self._args, _next(self._args, read)
            if before == self._args:
                return new
            wait_s = 0.0


class _Following:
    def __init__(self, node: Node, job: str, attempt: int, offset: int) -> None:
        self._patient = Patient(node)
        self._log = ReadArgs(job=job, attempt=attempt, offset=offset, wait_s=WAIT_S)
        self._shown: tuple[object, ...] | None = None

    def events(self) -> Iterator[FollowEvent]:
        metrics: MetricsReader | None = None
        while True:
            read = yield from self._patient.call(LOGS, self._log, WAIT_S + ANSWER_S)
            job, after = read.job, _next(self._log, read)
            state = (job.state, job.detail, job.attempt, self._patient.outages)
            if state != self._shown:
                self._shown = state
                yield StateChanged(job)
            if read.text:
                yield LogText(read.data, read.attempt, read.offset)
            metrics = metrics or MetricsReader(self._patient, job.id)
            for line in (yield from metrics.read()):
                yield MetricsRead(line)
            if job.state.ended and not read.text and after == self._log:
                yield Ended(job)
                return
            self._log = after


def _next(args: ReadArgs, read: ReadResult) -> ReadArgs:
    return args.model_copy(update={"job": read.job.id, "attempt": read.attempt, "offset": read.offset})


def _write(settings: Settings, record: JobRecord) -> None:
    write_atomic(settings.jobs / f"{record.key}.json", record.model_dump_json(indent=1).encode())


def _read(path: Path) -> JobRecord:
    try:
        return JobRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StoreCorrupt(f"{path} is no record of a job: {error}", hint="move it away") from error
