"""Which node has a job. What this laptop submitted it knows by itself; for the rest every node is asked at once.

A node that does not answer counts with what it said last, so a job is found where it is although nobody can be asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from campaigns.sync.jobs import records
from campaigns.sync.survey import NodeState, node_names, survey
from config.contracts.job import JobView
from config.errors import JobNotFound
from config.settings import Settings


@dataclass(frozen=True)
class JobAt:
    """A job and its node. `unknown_since` (Unix seconds): the node does not answer, `job` is what it said last."""

    node: str
    job: JobView
    unknown_since: float | None = None


def jobs_at(states: Sequence[NodeState]) -> list[JobAt]:
    """The jobs of all nodes, the newest first."""
    found = [JobAt(state.name, job, state.unknown_since) for state in states for job in state.seen.jobs]
    return sorted(found, key=lambda at: -at.job.created_at)


def node_of(settings: Settings, job: str, node: str = "") -> tuple[str, str]:
    """The node that has a job, and what to call it there.

    Args:
        job: an id, the start of one, or a model name (its newest job).
        node: where to look; empty: everywhere.

    Raises:
        JobNotFound: there is none, or the start of several ids.
    """
    names = [node] if node else node_names(settings)
    if len(names) == 1:
        return names[0], job
    own = {record.node for record in records(settings) if record.job_id == job}
    if len(own) == 1:
        return own.pop(), job
    found = find(survey(settings), job)
    return found.node, found.job.id


def find(states: Sequence[NodeState], text: str) -> JobAt:
    """The job meant by `text`; empty: the newest that has not ended, else the newest. Raises JobNotFound."""
    jobs = jobs_at(states)
    if not text:
        wanted = ([at for at in jobs if not at.job.state.ended] or jobs)[:1]
    else:
        by_id = [at for at in jobs if at.job.id == text]
        by_name = [at for at in jobs if at.job.name == text][:1]
        wanted = by_id or by_name or [at for at in jobs if at.job.id.startswith(text)]
    if len(wanted) == 1:
        return wanted[0]
    if wanted:
        several = ", ".join(f"{at.job.id} on {at.node}" for at in wanted[:5])
        raise JobNotFound(f'"{text}" means {len(wanted)} jobs', hint=f"type more of it, or name the node: {several}")
    silent = ", ".join(f"{state.name} ({state.problem})" for state in states if state.problem)
    what = f'no job "{text}"' if text else "no jobs yet"
    raise JobNotFound(f"{what}{f'; not asked: {silent}' if silent else ''}", hint="hafs train list shows them all")
