"""Jobs from the laptop's side: ship the data and submit, or find the job that was submitted for the same thing."""

from collections.abc import Callable

from campaigns.datasets import find, rows, seal_named
from campaigns.sync.jobs import pending, send, submit
from campaigns.sync.push import push
from campaigns.sync.remote import connect
from config.contracts.job import JobSpec, JobState, JobView
from config.errors import JobCancelled, JobFailed
from config.settings import Settings


def ship_and_submit(settings: Settings, node_name: str, spec: JobSpec, tell: Callable[[str], None]) -> JobView:
    """Send the data that the node lacks and queue a new job; a submit whose answer was lost is asked again, not made twice.

    Raises:
        NodeError, ConfigError, TransferError: nothing is queued that the same command would not find.
    """
    sealed = seal_named(settings, spec.data)
    with connect(settings, node_name) as node:
        pushed = push(node, sealed, lambda _done, _total: None)
        tell(f"dataset {pushed.dataset_id[:12]}: {pushed.rows} rows on {node_name}")
        whole = complete(settings, spec)
        record = pending(settings, whole, pushed.dataset_id, node_name)
        unanswered = record is not None and record.job_id is None
        result = send(settings, node, record) if record and unanswered else submit(settings, node, whole, pushed.dataset_id)
    tell(f"job {result.job.id} is queued on {node_name}")
    return result.job


def complete(settings: Settings, spec: JobSpec) -> JobSpec:
    """The spec with its system message: without one of its own, that of the data's first row. The node insists on one for all."""
    if spec.system:
        return spec
    first = next(rows(find(settings, spec.data[0])[1], 1))["messages"][0]
    return spec.model_copy(update={"system": first["content"]}) if first["role"] == "system" else spec


def attach_or_submit(settings: Settings, node_name: str, spec: JobSpec, dataset_id: str) -> tuple[JobView, bool]:
    """The job that was submitted for this spec and dataset, unless it failed or was cancelled; else a new one (True)."""
    record = pending(settings, spec, dataset_id, node_name)
    with connect(settings, node_name) as node:
        if record:
            result = send(settings, node, record)  # the same record is the same job
            if result.job.state not in (JobState.FAILED, JobState.CANCELLED):
                return result.job, result.new
        result = submit(settings, node, spec, dataset_id)
        return result.job, True


def require_success(job: JobView) -> JobView:
    """Raises JobFailed or JobCancelled, with what the node said."""
    if job.state is JobState.FAILED:
        error = job.error
        message = f"{error.code}: {error.message}" if error else "it did not say why"
        hint = (error.hint if error else "") or "hafs train logs shows all that it printed"
        raise JobFailed(f"job {job.id} failed: {message}", hint=hint)
    if job.state is JobState.CANCELLED:
        raise JobCancelled(f"job {job.id} was cancelled", hint="submit it again to train")
    return job
