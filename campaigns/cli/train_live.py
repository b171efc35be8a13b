"""A job in the terminal: its log as it grows, a metrics line now and then, each change of state."""

from collections.abc import Callable

from campaigns.cli import render
from campaigns.sync.jobs import Ended, LogText, MetricsRead, StateChanged, Unknown, follow
from campaigns.sync.remote import connect
from campaigns.training import require_success
from config.contracts.job import JobView
from config.contracts.wire import LOGS, ReadArgs
from config.settings import Settings


def follow_job(settings: Settings, node_name: str, job: str) -> JobView:
    """Follow until the job has ended; Ctrl-C ends the following, never the job. Raises JobFailed, JobCancelled."""
    try:
        ended = watch(settings, node_name, job, render.raw)
    except KeyboardInterrupt:
        render.note(f"the job goes on; come back with: {render.command('train', 'logs', job, '-f', node=node_name)}")
        raise
    render.job_end(ended)
    return require_success(ended)


def watch(settings: Settings, node_name: str, job: str, show: Callable[[str], None]) -> JobView:
    """The job once it has ended; what it prints goes to `show` on the way."""
    with connect(settings, node_name) as node:
        for event in follow(node, job):
            match event:
                case LogText(text):
                    show(text)
                case StateChanged(view):
                    render.note(render.job_line(view))
                case Unknown():
                    render.note(f"{node_name} does not answer: {event}; the job may well go on")
                case MetricsRead():
                    pass  # the log has them in words
                case Ended(view):
                    return view
    raise AssertionError("following ends with the job")


def print_log(settings: Settings, node_name: str, job: str) -> None:
    """The newest attempt's log as it is now."""
    with connect(settings, node_name) as node:
        args = ReadArgs(job=job)
        while (read := node.call(LOGS, args)).text:
            render.raw(read.text)
            args = ReadArgs(job=read.job.id, attempt=read.attempt, offset=read.offset)
