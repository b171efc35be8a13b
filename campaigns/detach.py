"""Campaigns in the background: started so that they survive the terminal, and stopped from any other one.

A detached campaign is the same command in a process of its own. Its starter waits until the campaign has its first answer, or has
ended: what is wrong with a key, a model or a server is said in the terminal that started it.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tenacity

from campaigns import live
from campaigns.live import LiveState
from campaigns.picture import Picture
from campaigns.store import CampaignFiles
from config.errors import translate_os_errors
from config.locks import holder

PATIENCE_S = 30.0  # a big model may take longer to load; the campaign goes on without its starter
POLL_MOST_S = 0.5


@dataclass(frozen=True)
class Started:
    """`exit_code` None: it runs. `words`: what it said as an error. `answered`: it has had a first answer, or has ended."""

    pid: int
    exit_code: int | None
    words: str
    answered: bool


def start_detached(files: CampaignFiles, arguments: Sequence[str], *, patience_s: float = PATIENCE_S) -> Started:
    """Run `hafs ARGUMENTS` for a campaign in a process that survives this one; return once it works or has ended.

    Raises:
        StoreError: its log cannot be written, or the process cannot be started.
    """
    errors = files.log.with_suffix(".err")
    before = time.time()
    with translate_os_errors(errors):
        errors.parent.mkdir(parents=True, exist_ok=True)
        with errors.open("ab") as output:
            said_before = output.seek(0, 2)
            argv = [sys.executable, "-P", "-m", "campaigns.cli.main", *arguments]
            child = _popen(argv, files.log.parent, output.fileno())
    answered = _wait_until(lambda: child.poll() is not None or _works(live.read(files), before), patience_s)
    with errors.open("rb") as said:
        said.seek(said_before)
        words = said.read().decode(errors="replace")
    return Started(child.pid, child.poll(), words, answered)


def stop(files: CampaignFiles, picture: Picture, *, now: bool) -> None:
    """Ask a running campaign to finish what runs (or to cancel it) and wait until its process has ended.

    Ctrl-C ends the waiting, not the request. Raises StoreError where the request cannot be written.
    """
    if picture.pid is None:
        return
    with translate_os_errors(files.path):
        live.ask_to_stop(files, picture.pid, now=now)
    _wait_until(lambda: holder(files.lock) != picture.pid, None)


def _works(state: LiveState | None, since: float) -> bool:
    """Whether a process that started after `since` has had an answer, or has told its end."""
    return state is not None and state.started_at >= since and (state.end is not None or any(lane.ok for lane in state.lanes))


def _wait_until(reached: Callable[[], bool], patience_s: float | None) -> bool:
    """Look ever less often. False: not within `patience_s`; None waits as long as it takes."""
    patience = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda found: not found),
        stop=tenacity.stop_never if patience_s is None else tenacity.stop_after_delay(patience_s),
        wait=tenacity.wait_exponential(multiplier=0.05, max=POLL_MOST_S),
        retry_error_callback=lambda _: False,
    )
    return patience(reached)


def _popen(argv: Sequence[str], cwd: Path, errors: int) -> "subprocess.Popen[bytes]":
    """A process without this terminal, session and standard streams; what it says as an error goes to the file `errors`."""

    def start(flags: int) -> "subprocess.Popen[bytes]":
        null = subprocess.DEVNULL
        return subprocess.Popen(
            argv, cwd=cwd, stdin=null, stdout=null, stderr=errors, start_new_session=True, creationflags=flags
        )  # Windows takes no notice of the session, the other systems none of flags that are 0

    if sys.platform != "win32":
        return start(0)
    flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
    try:  # a terminal may be a job object that is killed on close: break away from it
        return start(flags | subprocess.CREATE_BREAKAWAY_FROM_JOB)
    except PermissionError:  # it does not let go; it need not kill either
        return start(flags)
