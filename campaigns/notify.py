"""Tell somebody that a campaign or a job ended, failed or met its budget: a command, a webhook. Neither can hold it up.

The command is a list of words, never given to a shell; the message is its standard input. A webhook's address often is a secret:
it is never logged, its host is.
"""

import logging
import platform
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from subprocess import DEVNULL, PIPE
from typing import Literal
from urllib.parse import urlsplit

import anyio
from anyio import to_thread

from campaigns.logs import one_line
from campaigns.spec import NotifySpec
from campaigns.status import CampaignEnd, Progress
from campaigns.store import CampaignFiles, read_spec
from campaigns.sync.jobs import records
from config.contracts.base import Strict
from config.contracts.job import JobState, JobView
from config.errors import HafsError
from config.settings import Settings
from config.toml import load_toml

log = logging.getLogger("hafs.campaign")
TIMEOUT_S = 10.0
_TOO_LONG = "it took too long"

Occasion = Literal["end", "failure", "budget"]
_OCCASIONS: dict[str, Occasion] = {"budget": "budget", "exhausted": "failure"}  # by the reason of an end


class Notice(Strict):
    """The message, as the command and the webhook get it in JSON. Money in USD, `time` in Unix seconds."""

    occasion: Occasion
    campaign: str
    text: str
    hint: str = ""
    accepted: int
    target: int
    cost_usd: float
    max_usd: float | None
    machine: str
    time: float


class JobNotice(Strict):
    """The message of a training job that ended. `time` in Unix seconds."""

    occasion: Occasion
    job: str
    node: str
    model: str
    state: str
    text: str
    hint: str = ""
    machine: str
    time: float


def notice_of_job(job: JobView, node: str) -> JobNotice:
    """What there is to tell of a job's end."""
    error, result = job.error, job.result
    text = f"{job.name}: job {job.id} on {node} {job.state.value.lower()}"
    if error or result:
        text += f": {error.message}" if error else f": registered {result.model}" if result else ""
    return JobNotice(
        occasion="failure" if job.state is JobState.FAILED else "end",
        job=job.id,
        node=node,
        model=job.name,
        state=job.state.value,
        text=text,
        hint=error.hint if error else "",
        machine=platform.node(),
        time=time.time(),
    )


class NotifyFile(Strict):
    """HAFS_HOME/notify.toml: whom to tell of jobs that end."""

    notify: NotifySpec = NotifySpec()


def job_notify(settings: Settings, job: str) -> NotifySpec:
    """Whom to tell of a job's end: notify.toml; without it, the [notify] of the first campaign that the job was submitted with.

    Raises:
        ConfigError: notify.toml is wrong.
    """
    if settings.notify_file.exists():
        return load_toml(settings.notify_file, NotifyFile).notify
    named = [name for record in records(settings) if record.job_id == job for name in record.job.spec.data]
    specs = [read_spec(files).notify for name in named if (files := CampaignFiles(settings, name)).exists()]
    return next((spec for spec in specs if spec.command or spec.url), NotifySpec())


def notice_of(end: CampaignEnd | HafsError, progress: Progress) -> Notice:
    """What there is to tell of an end."""
    occasion: Occasion
    if isinstance(end, HafsError):
        occasion, text, hint = "failure", str(end), end.hint
    else:
        occasion, text, hint = _OCCASIONS.get(end.reason, "end"), end.message, ""
    return Notice(
        occasion=occasion,
        campaign=progress.spec.name,
        text=text,
        hint=hint,
        accepted=progress.done,
        target=progress.spec.target,
        cost_usd=progress.cost_usd,
        max_usd=progress.spec.budget.max_usd,
        machine=platform.node(),
        time=time.time(),
    )


async def notify(spec: NotifySpec, notice: Notice | JobNotice) -> None:
    """Run the command and post to the webhook, at the same time, 10 s each. What fails is logged; nothing is raised.

    Who asked to hear of the end hears of every end.
    """
    if not {notice.occasion, "end"} & set(spec.on):
        return
    message = notice.model_dump_json().encode()
    with anyio.CancelScope(shield=True):  # a campaign that is being cancelled tells of it too
        async with anyio.create_task_group() as group:
            if spec.command:
                group.start_soon(_deliver, f"command {spec.command[0]}", partial(_run_command, spec.command, message))
            if spec.url:
                group.start_soon(_deliver, f"webhook at {urlsplit(spec.url).hostname}", partial(_post, spec.url, message))


async def _deliver(what: str, send: Callable[[], Awaitable[str]]) -> None:
    """One delivery; `send` returns what went wrong, or nothing."""
    problem = await send()
    if problem:
        log.warning("notify %s failed: %s", what, one_line(problem))
    else:
        log.info("notify %s was told", what)


async def _run_command(command: Sequence[str], message: bytes) -> str:
    """In a thread: subprocess does not mind a command that ends without reading its input, which is most of them."""

    def run() -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(command, input=message, stdout=DEVNULL, stderr=PIPE, timeout=TIMEOUT_S, check=False)

    try:
        done = await to_thread.run_sync(run)
    except subprocess.TimeoutExpired:
        return _TOO_LONG
    except OSError as error:
        return f"it cannot be started: {error.strerror or error}"
    said = done.stderr.decode(errors="replace").strip()
    return f"exit code {done.returncode}{f': {said}' if said else ''}" if done.returncode else ""


async def _post(url: str, message: bytes) -> str:
    import aiohttp

    patience = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(trust_env=True, timeout=patience) as session,
            session.post(url, data=message, headers={"Content-Type": "application/json"}) as reply,
        ):
            return f"HTTP status {reply.status}" if reply.status >= 300 else ""
    except TimeoutError:
        return _TOO_LONG
    except aiohttp.ClientConnectorError as error:
        return f"cannot connect: {error.strerror or type(error).__name__}"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return type(error).__name__  # its text may hold the address
