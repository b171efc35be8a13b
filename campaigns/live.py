"""What a running campaign shows of itself, and how it is asked to stop: two small files in its folder.

- `live.json` is written about once a second by the process that holds the campaign's lock, whole or not at all, never fsynced: it
  is news, not truth. What counts is in the campaign's other files.
- `stop.json` asks that process to end. It names the process, so a request that came too late stops nobody else. It works wherever
  files do: Windows has no signals, and a process over a network folder cannot be signalled.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio
from pydantic import ValidationError

from agents.lanes import LaneView
from campaigns.logs import Narrator
from campaigns.status import CampaignEnd, Progress
from campaigns.store import CampaignFiles
from config.contracts.base import Tolerant
from config.errors import HafsError

log = logging.getLogger("hafs.campaign")
EVERY_S = 1.0
RATE_WINDOW_S = 60.0

M = TypeVar("M", bound=Tolerant)


class DomainFigures(Tolerant):
    accepted: int = 0
    wanted: int = 0
    rejected: int = 0
    failed: int = 0


class Figures(Tolerant):
    """How far a campaign is. Money in USD, rate in accepted samples a second, None where there is none yet."""

    target: int = 0
    domains: dict[str, DomainFigures] = {}
    reasons: dict[str, int] = {}
    cost_usd: float = 0.0
    assumed_usd: float = 0.0
    max_usd: float | None = None
    rate: float | None = None
    eta_s: float | None = None

    @property
    def accepted(self) -> int:
        return sum(domain.accepted for domain in self.domains.values())

    @property
    def rejected(self) -> int:
        return sum(domain.rejected for domain in self.domains.values())

    @property
    def failed(self) -> int:
        return sum(domain.failed for domain in self.domains.values())

    @property
    def calls(self) -> int:
        return self.accepted + self.rejected + self.failed

    @property
    def accept_rate(self) -> float | None:
        judged = self.accepted + self.rejected
        return self.accepted / judged if judged else None


class LaneFigures(Tolerant):
    """A LaneView of this run, as it is written down; `per_s` and `tokens_per_s` are of the last minute."""

    name: str = ""
    model: str = ""
    endpoint: str = ""
    paid: bool = False
    in_flight: int = 0
    limit: int = 0
    ok: int = 0
    failed: int = 0
    idle: str = ""
    idle_s: dict[str, float] = {}
    latency_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    last_error: str = ""
    per_s: float = 0.0
    tokens_per_s: float = 0.0


class EndFigures(Tolerant):
    """How a run ended: a reason of CampaignEnd, or "error"."""

    reason: str = ""
    message: str = ""
    hint: str = ""
    accepted: int = 0
    new: int = 0
    cost_usd: float = 0.0


class LiveState(Tolerant):
    """`state`: running, draining, "paused: …" or "waiting: …". Times are Unix seconds. `end` None: it has not ended."""

    pid: int
    started_at: float
    written_at: float
    state: str = "running"
    figures: Figures = Figures()
    lanes: list[LaneFigures] = []
    reserved_usd: float = 0.0
    end: EndFigures | None = None


class StopRequest(Tolerant):
    """For the process `pid`. `now`: cancel what runs instead of finishing it."""

    pid: int
    written_at: float
    now: bool = False


@dataclass(frozen=True)
class RunView:
    """What the engine says of itself each second. `note`: "draining" or "paused: …"; empty: it runs."""

    lanes: Sequence[LaneView]
    reserved_usd: float = 0.0
    note: str = ""


class Live:
    """The running process's side: keeps `live.json` up to date. One for each run."""

    def __init__(self, files: CampaignFiles, progress: Progress) -> None:
        self._files, self._progress = files, progress
        self._started_at = time.time()
        self._speed = _Speed()
        self._unheard_since: float | None = None
        self._complained = False

    def publish(self, view: RunView, end: CampaignEnd | HafsError | None = None) -> LiveState:
        """Write down how it stands. A disk that takes nothing is logged once: news may be lost, the campaign goes on."""
        now = time.time()
        state = LiveState(
            pid=os.getpid(),
            started_at=self._started_at,
            written_at=now,
            state=view.note or self._state(view.lanes, now),
            figures=figures_of(self._progress),
            lanes=self._speed.measured(view.lanes),
            reserved_usd=view.reserved_usd,
            end=None if end is None else _end(end),
        )
        try:
            _write(_live_path(self._files), state)
        except OSError as error:
            if not self._complained:
                log.warning("live figures cannot be written: %s", error)
            self._complained = True
        return state

    def asked_to_stop(self) -> StopRequest | None:
        """A request for this very process, once."""
        path = _stop_path(self._files)
        request = _read(path, StopRequest) if path.exists() else None
        if request is None or request.pid != os.getpid() or request.written_at < self._started_at - EVERY_S:
            return None
        path.unlink(missing_ok=True)
        return request

    def _state(self, lanes: Sequence[LaneView], now: float) -> str:
        unheard = bool(lanes) and all(lane.idle in ("breaker", "closed") and not lane.in_flight for lane in lanes)
        if not unheard:
            self._unheard_since = None
            return "running"
        self._unheard_since = self._unheard_since or now
        return f"waiting: no lane answers since {time.strftime('%H:%M:%S', time.localtime(self._unheard_since))}"


async def serve_live(
    live: Live,
    progress: Progress,
    look: Callable[[], RunView],
    on_stop: Callable[[bool], None],
    show: Callable[[LiveState], None],
) -> None:
    """Each second: write the figures, show them, tell the log what is worth it, heed a request to stop. Runs until cancelled.

    `on_stop` is given whether what runs is to be cancelled (True) or finished.
    """
    narrator = Narrator(progress)
    while True:
        view = look()
        show(live.publish(view))
        narrator.tick(view.lanes, view.note)
        if request := live.asked_to_stop():
            log.info("stop was asked for: %s", "what runs is cancelled" if request.now else "what runs is finished")
            on_stop(request.now)
        await anyio.sleep(EVERY_S)


class _Speed:
    """Answers and tokens a second of each lane, over the last minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, tuple[int, int]]]] = deque()

    def measured(self, lanes: Sequence[LaneView]) -> list[LaneFigures]:
        now = time.monotonic()
        counts = {lane.name: (lane.ok, lane.completion_tokens) for lane in lanes}
        self._seen.append((now, counts))
        while self._seen[0][0] < now - RATE_WINDOW_S:
            self._seen.popleft()
        begin, before = self._seen[0]
        return [_lane_figures(lane, before, now - begin) for lane in lanes]


def _lane_figures(lane: LaneView, before: Mapping[str, tuple[int, int]], span_s: float) -> LaneFigures:
    ok, tokens = before.get(lane.name, (0, 0))
    figures = LaneFigures.model_validate(lane, from_attributes=True)
    if span_s <= 0:
        return figures
    return figures.model_copy(
        update={"per_s": (lane.ok - ok) / span_s, "tokens_per_s": (lane.completion_tokens - tokens) / span_s}
    )


def read(files: CampaignFiles) -> LiveState | None:
    """What a campaign's process has last said; None: nothing."""
    return _read(_live_path(files), LiveState)


def ask_to_stop(files: CampaignFiles, pid: int, *, now: bool) -> None:
    """Ask the process that holds the campaign to finish what runs, or to cancel it. Raises OSError."""
    _write(_stop_path(files), StopRequest(pid=pid, written_at=time.time(), now=now))


def figures_of(progress: Progress) -> Figures:
    domains = {
        name: DomainFigures(
            accepted=progress.accepted[name],
            wanted=progress.share(name),
            rejected=progress.rejected[name],
            failed=progress.failed[name],
        )
        for name in progress.spec.domains
    }
    return Figures(
        target=progress.spec.target,
        domains=domains,
        reasons=dict(progress.reasons.most_common()),
        cost_usd=progress.cost_usd,
        assumed_usd=progress.assumed_usd,
        max_usd=progress.spec.budget.max_usd,
        rate=progress.rate,
        eta_s=progress.eta_s,
    )


def _end(end: CampaignEnd | HafsError) -> EndFigures:
    if isinstance(end, HafsError):
        return EndFigures(reason="error", message=str(end), hint=end.hint)
    return EndFigures(reason=end.reason, message=end.message, accepted=end.accepted, new=end.new, cost_usd=end.cost_usd)


def _live_path(files: CampaignFiles) -> Path:
    return files.path / "live.json"


def _stop_path(files: CampaignFiles) -> Path:
    return files.path / "stop.json"


def _write(path: Path, model: Tolerant) -> None:
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(model.model_dump_json(), encoding="utf-8")
    os.replace(temp, path)


def _read(path: Path, model: type[M]) -> M | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError):
        # Windows lets nobody read a file while it is being replaced; another version may write it otherwise. It is news: the
        # next look will do.
        return None
