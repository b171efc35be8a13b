"""A job as it goes, for a screen: its metrics, the queue and the GPU of its node, looked at once a second.

A node that does not answer leaves the last picture, marked unknown since when; looking goes on without end until the job ends.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

from campaigns.sync.jobs import ANSWER_S, MetricsReader, Patient, Unknown
from campaigns.sync.remote import Node
from config.contracts.job import JobView, Metrics
from config.contracts.wire import GPU, STATUS, GpuResult, JobArgs, Nothing

LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class JobPicture:
    """`queue`: the node's jobs that have not ended, the next one first. `unknown`: the node does not answer now."""

    node: str
    job: JobView
    metrics: list[Metrics] = field(default_factory=list)
    queue: list[JobView] = field(default_factory=list)
    gpu: GpuResult = field(default_factory=GpuResult)
    unknown: Unknown | None = None


def pictures(node: Node, job: JobView) -> Iterator[JobPicture]:
    """The job now and about once a second from then on; the last picture is that of its end."""
    picture = JobPicture(node.name, job)
    patient = Patient(node)
    reader = MetricsReader(patient, job.id)
    while True:
        for seen in _look(patient, reader, picture):
            picture = replace(picture, unknown=seen) if isinstance(seen, Unknown) else seen
            yield picture
        if picture.job.state.ended:
            return


def _look(patient: Patient, reader: MetricsReader, before: JobPicture) -> Generator[Unknown | JobPicture, None, None]:
    # The states are read before the metrics: if the job has ended, then these are all.
    jobs = (yield from patient.call(STATUS, JobArgs(), ANSWER_S)).jobs
    gpu = yield from patient.call(GPU, Nothing(), ANSWER_S)
    job = next(view for view in jobs if view.id == before.job.id)
    queue = sorted((view for view in jobs if not view.state.ended), key=_turn)
    waiting = LOOK_EVERY_S if before.metrics or before.queue else 0.0
    new = yield from reader.read(0.0 if job.state.ended else waiting)
    yield JobPicture(before.node, job, _merged(before.metrics, new), queue, gpu)


def _turn(job: JobView) -> tuple[bool, int, float]:
    return not job.state.active, -job.priority, job.created_at


def _merged(before: list[Metrics], new: list[Metrics]) -> list[Metrics]:
    """By step; of two with the same step the later one holds, and a step that is written again ends what came after it."""
    merged = list(before)
    for line in new:
        while merged and merged[-1].step >= line.step:
            merged.pop()
        merged.append(line)
    return merged
