"""Jobs from the laptop's side: ship the data and submit, or find the job that was submitted for the same thing."""

from collections.abc import Callable
from dataclasses import dataclass

from campaigns.choice import choose_node
from campaigns.datasets import find, rows, sealing_named
from campaigns.locate import JobAt, node_of
from campaigns.sync.jobs import Order, pending, records, send, submit
from campaigns.sync.push import push
from campaigns.sync.remote import connect
from campaigns.sync.seal import Sealing
from config.contracts.job import JobSpec, JobState, JobView
from config.contracts.manifest import DatasetManifest
from config.contracts.wire import STATUS, JobArgs, JobsResult, Verb
from config.errors import ConfigError, JobCancelled, JobFailed
from config.settings import LOCAL, Settings

AUTO = "auto"  # the node that suits best


@dataclass(frozen=True)
class Wish:
    """Where and when a job shall run. `node`: empty for that of the job `after`, else this machine; "auto": the best.

    `after`: a job (id, start of one, model name) that has to succeed before.
    """

    node: str = ""
    priority: int = 0
    after: str = ""


def ship_and_submit(settings: Settings, wish: Wish, spec: JobSpec, tell: Callable[[str], None]) -> JobAt:
    """Send the data that the node lacks and queue a new job; a submit whose answer was lost is asked again, not made twice.

    Raises:
        NodeError, ConfigError, TransferError: nothing is queued that the same command would not find.
        JobNotFound: there is no job like `wish.after` on that node.
    """
    whole = complete(settings, spec)
    with sealing_named(settings, spec.data) as sealing:
        node_name, after = _place(settings, wish, whole, sealing, tell)
        with connect(settings, node_name) as node:
            order = Order(wish.priority, node.call(STATUS, JobArgs(job=after)).jobs[0].id if after else "")
            pushed = push(node, sealing, lambda _done, _total: None)
            tell(f"dataset {pushed.dataset_id[:12]}: {pushed.rows} rows on {node_name}")
            record = pending(settings, whole, pushed.dataset_id, node_name)
            if record and record.job_id is None:
                result = send(settings, node, record)
            else:
                result = submit(settings, node, whole, pushed.dataset_id, order)
    tell(f"job {result.job.id} is queued on {node_name}")
    return JobAt(node_name, result.job)


def _place(settings: Settings, wish: Wish, spec: JobSpec, data: Sealing, tell: Callable[[str], None]) -> tuple[str, str]:
    """The node for a wish, and what the job to wait for is called there."""
    if wish.node == AUTO and wish.after:
        raise ConfigError("--after names a job, and with it the node", hint="leave --node auto out")
    if wish.node == AUTO:  # the best one may be that which has the data: all of it has to be known
        return _best(settings, spec, data.finish().manifest, tell), ""
    if wish.after:
        return node_of(settings, wish.after, wish.node)
    return wish.node or LOCAL, ""


def _best(settings: Settings, spec: JobSpec, data: DatasetManifest, tell: Callable[[str], None]) -> str:
    for record in records(settings):
        if record.job_id is None and (record.job.spec, record.job.dataset_id) == (spec, data.id):
            tell(f"{record.node}: the same was sent there, and the answer was lost")
            return record.node
    choice = choose_node(settings, spec.base, data.segments)
    for number, why in enumerate(choice.why):
        tell(f"{'chosen' if number == 0 else 'not   '} {why}")
    return choice.node


def ask_about(settings: Settings, verb: Verb[JobArgs, JobsResult], job: str, node: str = "") -> JobAt:
    """Ask the node that has a job about it: its state, or to cancel it, or to try it again. Raises NodeError, JobNotFound."""
    name, there = node_of(settings, job, node)
    with connect(settings, name) as remote:
        return JobAt(name, remote.call(verb, JobArgs(job=there)).jobs[0])


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
