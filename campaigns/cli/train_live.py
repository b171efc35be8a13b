"""A job in the terminal: its log as it grows, or a screen of its figures. Whoever follows a job to its end tells of the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

from campaigns.cli import render, render_train
from campaigns.cli.screen import Screen
from campaigns.locate import JobAt
from campaigns.notify import job_notify, notice_of_job, notify
from campaigns.sync.jobs import Ended, LogText, MetricsRead, MetricsReader, Patient, StateChanged, Unknown, follow
from campaigns.sync.remote import connect, node_named
from campaigns.training import require_success
from campaigns.watching import JobPicture, pictures
from config.contracts.job import JobView, Metrics
from config.contracts.wire import LOGS, ReadArgs
from config.errors import NodeUnreachable
from config.settings import Settings

LINE_EVERY_S = 10.0


def follow_job(settings: Settings, node_name: str, job: str) -> JobView:
    """Follow until the job has ended; Ctrl-C ends the following, never the job. Raises JobFailed, JobCancelled."""
    ended = _followed(settings, node_name, job)
    render.job_end(ended)
    return require_success(ended)


def follow_log(settings: Settings, node_name: str, job: str) -> JobView:
    """The same, with nothing but the log on stdout."""
    ended = _followed(settings, node_name, job)
    return require_success(ended)


def watch(settings: Settings, node_name: str, job: str, show: Callable[[bytes], None]) -> JobView:
    """The job once it has ended; what it prints goes to `show` on the way."""
    states: list[JobView] = []
    with connect(settings, node_name) as node:
        for event in follow(node, job):
            match event:
                case LogText(data):
                    show(data)
                case StateChanged(view):
                    states.append(view)
                    render.note(render.job_line(view))
                case Unknown():
                    render.note(f"{node_name} does not answer: {event}; the job may well go on")
                case MetricsRead():
                    pass  # the log has them in words
                case Ended(view):
                    if not states[0].state.ended:
                        tell_end(settings, node_name, view)
                    return view
    raise AssertionError("following ends with the job")


def watch_job(settings: Settings, at: JobAt) -> JobView:
    """A live screen until the job has ended; where there is no terminal, a line now and then. Raises JobFailed, JobCancelled."""
    with _going_on(at.node, "watch", at.job.id), _Screen() as screen, node_named(settings, at.node) as node:
        for picture in pictures(node, at.job):
            screen.show(picture)
    if not at.job.state.ended:
        tell_end(settings, at.node, picture.job)
    render.job_end(picture.job)
    return require_success(picture.job)


def tell_end(settings: Settings, node_name: str, job: JobView) -> None:
    """Send [notify] of a job that ended before our eyes."""
    anyio.run(notify, job_notify(settings, job.id), notice_of_job(job, node_name))


def print_log(settings: Settings, node_name: str, job: str) -> None:
    """The newest attempt's log as it is now."""
    with connect(settings, node_name) as node:
        args = ReadArgs(job=job)
        while (read := node.call(LOGS, args)).text:
            render_train.log(read.data)
            args = ReadArgs(job=read.job.id, attempt=read.attempt, offset=read.offset)
        if args.job == job and not args.attempt:
            render.note(f"{read.job.id} is {read.job.state}: it has printed nothing yet")


def read_metrics(settings: Settings, node_name: str, job: str) -> list[Metrics]:
    """All metrics of a job as they are now. Raises NodeUnreachable."""
    with connect(settings, node_name) as node:
        reading = MetricsReader(Patient(node), job).read()
        try:
            lost = next(reading)
        except StopIteration as end:
            return list(end.value)
    raise NodeUnreachable(f"{node_name}: {lost.reason}", hint="ask again later")


def _followed(settings: Settings, node_name: str, job: str) -> JobView:
    with _going_on(node_name, "logs", job, "-f"):
        return watch(settings, node_name, job, render_train.log)


@contextmanager
def _going_on(node_name: str, *words: str) -> Iterator[None]:
    """Ctrl-C leaves the job alone, and says how to come back to it."""
    try:
        yield
    except KeyboardInterrupt:
        render.note(f"the job goes on; come back with: {render.command('train', *words, node=node_name)}")
        raise


class _Screen(Screen):
    """Where the pictures of a job go, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0
        self._told: tuple[object, ...] = ()

    def show(self, seen: JobPicture) -> None:
        if self.live:
            return self.draw(render_train.job_screen(seen, time.time()))
        state = (seen.job.state, seen.unknown is None)
        if state != self._told or time.monotonic() >= self._next:
            self._told, self._next = state, time.monotonic() + LINE_EVERY_S
            render.line(render_train.job_progress(seen))
