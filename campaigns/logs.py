"""A campaign's log: one event a line, in words a person reads, with `key=value` for what a program may look for.

    2026-11-21T12:00:03Z INFO    accepted asm adc-imm lane=flash 1.2s 48 tok $0.0001

The word after the level says what happened: start, lane, accepted, rejected, failed, summary, budget, pause, resume, stall, end.
What servers and models say is untrusted: it never makes a second line.
"""

import logging
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from agents.lanes import Lane, LaneEvent, LaneView
from campaigns.spec import CampaignSpec
from campaigns.status import CampaignEnd, Progress
from campaigns.store import Call, CampaignFiles
from config.errors import ConfigError, HafsError, translate_os_errors
from config.locks import holder
from config.settings import Settings

log = logging.getLogger("hafs.campaign")
POLL_S = 0.2  # a file has no portable event to wait for
SUMMARY_S = 60.0
STALL_S = 300.0
SLEPT_S = 30.0  # a second that took so long: the machine slept
MARKS = (0.5, 0.8, 1.0)  # of the budget
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_LONGEST_TEXT = 400
_LOUD = ("closed", "down")  # kinds of lane events that a person should see at once
_FAILING_S = 15.0  # between two lines about requests that failed at a lane
_GPU_QUIET_S = 10.0  # without a look in which others had the GPU: it is free again
REASONS = {  # by LaneView.idle; short enough to stand below a lane's name on 80 columns
    "limit": "all its slots are busy",
    "rate": "rate limit reached",
    "breaker": "server does not answer",
    "threshold": "others use its GPU",
    "lease": "GPU leased to training",
    "measuring": "who uses its GPU?",
    "swap": "another model's turn",
    "tail": "faster lanes do the rest",
    "budget": "budget held by calls",
    "free_first": "free lanes meet the deadline",
    "storing": "its answers are written",
    "stopping": "takes no new work",
    "closed": "closed for this run",
    "no_work": "nothing to do",
}


# writing ---------------------------------------------------------------------------------------------------------------


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Lines of the campaign's logger go to `path`, appended, times in UTC: plain `tail -f` works.

    Raises:
        StoreError: it cannot be written.
    """
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    propagated, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.propagate = propagated
        log.removeHandler(handler)
        handler.close()


def log_start(spec: CampaignSpec, progress: Progress, lanes: Sequence[Lane]) -> None:
    """The first lines of a run: what is wanted, what is there, by which lanes, with which versions."""
    cap = "none" if spec.budget.max_usd is None else usd(spec.budget.max_usd)
    log.info(
        "start target=%d accepted=%d calls=%d spent=%s cap=%s domains=%s hafs=%s python=%s %s",
        spec.target,
        progress.done,
        progress.calls,
        usd(progress.cost_usd),
        cap,
        ",".join(spec.domains),
        version("hafs"),
        platform.python_version(),
        platform.platform(terse=True),
    )
    for lane in lanes:
        whose = "own" if lane.own else "paid" if lane.paid else "free"
        log.info("lane %s opened model=%s at=%s %s", lane.name, lane.model, _quoted(lane.endpoint.key), whose)


def log_event(event: LaneEvent) -> None:
    """What happened to a lane: closed, down, back, a limit found, a swap, idle and why."""
    log.log(logging.WARNING if event.kind in _LOUD else logging.INFO, "%s", line_of(event))


def log_call(call: Call) -> None:
    """How one call ended."""
    log.log(logging.WARNING if call.verdict == "failed" else logging.INFO, "%s", line_of(call))


def log_end(end: CampaignEnd | HafsError, progress: Progress, lanes: Sequence[LaneView], wall_s: float) -> None:
    """The last lines of a run: totals and idle seconds of each lane, then the reason in one line."""
    for lane in lanes:
        idle = ", ".join(f"{reason} {seconds:.0f}s" for reason, seconds in idle_times(lane.idle_s)) or "never"
        log.info(
            "lane %s total ok=%d failed=%d tok=%d+%d cost=%s idle: %s",
            lane.name,
            lane.ok,
            lane.failed,
            lane.prompt_tokens,
            lane.completion_tokens,
            usd(lane.cost_usd),
            idle,
        )
    counts = f"accepted={progress.done} calls={progress.calls} cost={usd(progress.cost_usd)} wall={span(wall_s)}"
    if isinstance(end, HafsError):
        log.error("end reason=%s %s: %s", type(end).__name__, counts, one_line(f"{end}; {end.hint}" if end.hint else str(end)))
    else:
        log.info("end reason=%s %s: %s", end.reason, counts, one_line(end.message))


def line_of(event: Call | LaneEvent) -> str:
    """An event in the log's words, without time and level."""
    if isinstance(event, LaneEvent):
        words = REASONS.get(event.text.split(" ", 1)[0], "") if event.kind == "idle" else ""
        text = f"{one_line(event.text)} ({words})" if words else one_line(event.text)
        return f"lane {event.lane} {event.kind}: {text}" if text else f"lane {event.lane} {event.kind}"
    spent = f" {usd(event.cost_usd)}{' assumed' if event.cost_assumed else ''}" if event.cost_usd else ""
    tries = f" attempt={event.attempt}" if event.attempt > 1 else ""
    said = f"{event.verdict} {event.domain} {event.cell} lane={event.lane or '-'}{tries}"
    if event.verdict != "failed":
        said += f" {event.latency_s:.1f}s {event.completion_tokens} tok"
    said += spent
    if event.verdict == "accepted":
        return said
    return f"{said} reason={one_line(event.reason)}{f': {one_line(event.detail)}' if event.detail else ''}"


def summary_of(progress: Progress, lanes: Sequence[LaneView], answers: Mapping[str, int], span_s: float) -> str:
    """One minute in one line. `answers` are those of each lane in the last `span_s` seconds."""
    rate = f"{progress.rate:.2f}/s" if progress.rate else "0/s"
    accept = "?" if progress.accept_rate is None else f"{100 * progress.accept_rate:.0f}%"
    eta = "?" if progress.eta_s is None else span(progress.eta_s)
    said = [
        f"summary {progress.done}/{progress.spec.target} {100 * progress.done / progress.spec.target:.0f}% {rate} eta={eta} "
        f"accept={accept} failed={progress.failed.total()} cost={usd(progress.cost_usd)}"
    ]
    for lane in lanes:
        busy = f"{answers.get(lane.name, 0) / max(span_s, 1e-3):.2f}/s {lane.in_flight} of {lane.limit} at once"
        said.append(f"{lane.name} {busy}{f' ({lane.idle})' if lane.idle else ''}")
    return "; ".join(said)


class Narrator:
    """What a run says of itself now and then: a summary each minute, requests that failed, a GPU that is free again, budget
    marks, pauses, stalls, a machine that slept.

    `clock` (seconds) may stand still while the machine sleeps, `wall` (Unix seconds) does not.
    """

    def __init__(
        self, progress: Progress, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        now = clock()
        self._progress = progress
        self._clock, self._wall_clock = clock, wall
        self._note = ""
        self._last = self._summed = self._moved = now
        self._wall = wall()
        self._calls = progress.calls
        self._answers: dict[str, int] = {}
        self._failed: dict[str, tuple[int, float]] = {}  # by lane: how many were told, and when
        self._gpu_taken: dict[str, tuple[float, float]] = {}  # by lane: from when until when others had its GPU
        self._told = self._mark()

    def tick(self, lanes: Sequence[LaneView], note: str) -> None:
        """Called about once a second. `note`: why the run does not go on ("paused: …", "draining"), or empty."""
        now, wall = self._clock(), self._wall_clock()
        self._tell_sleep(now, wall)
        if note != self._note:
            self._tell_note(note)
        if (mark := self._mark()) > self._told:
            self._told = mark
            log.warning("budget %.0f%% used: %s of %s", 100 * mark, usd(self._progress.cost_usd), usd(self._cap or 0.0))
        for lane in lanes:
            self._tell_failures(now, lane)
            self._tell_gpu(now, lane)
        self._tell_stall(now, lanes)
        if now - self._summed >= SUMMARY_S:
            answers = {lane.name: lane.ok - self._answers.get(lane.name, 0) for lane in lanes}
            log.info("%s", summary_of(self._progress, lanes, answers, now - self._summed))
            self._summed, self._answers = now, {lane.name: lane.ok for lane in lanes}

    @property
    def _cap(self) -> float | None:
        return self._progress.spec.budget.max_usd

    def _mark(self) -> float:
        """The highest mark of the budget that the money spent has reached; 0 for none."""
        spent = self._progress.cost_usd / self._cap if self._cap else 0.0
        return max((mark for mark in MARKS if spent >= mark), default=0.0)

    def _tell_note(self, note: str) -> None:
        if note:
            log.log(logging.WARNING if note.startswith("paused") else logging.INFO, "%s", one_line(f"pause {note}"))
        else:
            log.info("resume it goes on after: %s", one_line(self._note))
        self._note = note

    def _tell_failures(self, now: float, lane: LaneView) -> None:
        """A request that failed and is made again leaves no line of its own: its task is not lost."""
        told, when = self._failed.get(lane.name, (0, -math.inf))
        if lane.failed > told and now >= when + _FAILING_S:
            self._failed[lane.name] = (lane.failed, now)
            count = "1 request" if lane.failed == told + 1 else f"{lane.failed - told} requests"
            log.warning("lane %s failing: %s, made again or elsewhere; the last: %s", lane.name, count, one_line(lane.last_error))

    def _tell_gpu(self, now: float, lane: LaneView) -> None:
        if lane.idle in ("threshold", "lease"):
            since, _ = self._gpu_taken.get(lane.name, (now, now))
            self._gpu_taken[lane.name] = (since, now)
        elif lane.idle in ("", "limit") and now - self._gpu_taken.get(lane.name, (now, now))[1] >= _GPU_QUIET_S:
            since, until = self._gpu_taken.pop(lane.name)
            log.info("lane %s back: its GPU is free again, after %s", lane.name, span(until - since))

    def _tell_stall(self, now: float, lanes: Sequence[LaneView]) -> None:
        if self._progress.calls != self._calls:
            self._calls, self._moved = self._progress.calls, now
        elif now - self._moved >= STALL_S:
            why = ", ".join(f"{lane.name}: {lane.idle or f'{lane.in_flight} calls run'}" for lane in lanes)
            log.warning("stall no call has ended for %s (%s)", span(STALL_S), why)
            self._moved = now

    def _tell_sleep(self, now: float, wall: float) -> None:
        slept = max(now - self._last, wall - self._wall)
        if slept > SLEPT_S:
            log.warning("resume after %s in which nothing ran (the machine slept, or its clock was set)", span(slept))
        self._last, self._wall = now, wall


def one_line(text: str) -> str:
    """Text of a server or model, fit for a line of a log."""
    text = _CONTROL.sub(" ", text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def usd(amount: float) -> str:
    """$5.00, $0.0123: as many digits as a price of a few calls needs."""
    return f"${amount:.2f}" if amount >= 1 else f"${amount:.4f}"


def _quoted(text: str) -> str:
    return f'"{one_line(text)}"' if " " in text else one_line(text)


def idle_times(idle_s: Mapping[str, float]) -> list[tuple[str, float]]:
    """Seconds in which a lane had a free slot, by reason, the longest first. At its server's limit a lane is busy, not idle."""
    told = [(reason, seconds) for reason, seconds in idle_s.items() if seconds >= 0.5 and reason != "limit"]
    return sorted(told, key=lambda item: -item[1])


def span(seconds: float) -> str:
    """1:05 for 65 s, 2:03:00 for two hours and three minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# reading ---------------------------------------------------------------------------------------------------------------


def log_lines(settings: Settings, name: str, follow: bool) -> Iterator[str]:
    """Whole lines without their newline. Following ends when the campaign's process has ended.

    Raises:
        ConfigError: no such campaign.
    """
    files = CampaignFiles(settings, name)
    if not files.log.exists():
        raise ConfigError(f'no log of a campaign "{name}": {files.log}', hint="see which there are: hafs campaign list")
    rest = ""
    with open(files.log, encoding="utf-8", errors="replace") as file:
        while True:
            running = follow and holder(files.lock) is not None  # asked before the read: nothing it wrote is missed
            rest += file.read()
            *lines, rest = rest.split("\n")
            yield from lines
            if not running:
                break
            time.sleep(POLL_S)
    if rest:
        yield rest
