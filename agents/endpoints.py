"""What a scheduler knows of the endpoints and lanes of one run, and how much work each may take now.

- An endpoint never has more calls in flight than its limit, and never starts more than rpm, tpm and rpd allow.
- Lowering a limit never ends running work.
- `why_not` is the one place that says whether a lane may start a call; its answer is the recorded reason of an idle slot.
"""

import math
from collections.abc import Sequence

from agents.breaker import Breaker
from agents.concurrency import Aimd, Gradient
from agents.gpu import GpuShare, LatencyTelemetry
from agents.lanes import MOST_IN_FLIGHT, Endpoint, Idle, Lane, LaneView
from agents.rates import Rates
from agents.task import Usage
from agents.turns import Turns
from config.errors import ProviderError

_LONGEST_CLOSURE_OWN_S = 4.0  # a server of one's own is tried soon: trying costs nothing
_LONGEST_CLOSURE_S = 60.0
_SMOOTHING = 0.1  # of the average latency
_RACE_LOST_S = 0.05  # another process took what was free: the next look
_TELL_LIMIT_EVERY_S = 30.0
_HARDLY = 0.1  # of a limit: a change that nobody wants to read of
REFUSALS_TO_DESPAIR = 5
REFUSALS_TO_PAUSE = 3
EMPTY_DAYS_TO_DESPAIR = 3


class EndpointState:
    """One bottleneck and the calls at it."""

    def __init__(self, spec: Endpoint, lanes: Sequence[str], *, own: bool) -> None:
        self.spec = spec
        self.in_flight = 0
        self.sharers = 1  # processes that use it now, this one counted
        self.unanswered_since: float | None = None  # the first of the calls in a row that failed or were refused
        self.probing = False
        self.breaker = Breaker(_LONGEST_CLOSURE_OWN_S if own else _LONGEST_CLOSURE_S)
        self.rates = Rates(spec.rpm, spec.tpm, spec.rpd, ledger=spec.shared / "rates" if spec.shared else None)
        self.gpu = GpuShare(spec.gpu.low, spec.gpu.high) if spec.gpu else None
        self.most = spec.slots or MOST_IN_FLIGHT
        self.concurrency = Gradient(self.most) if spec.queues and spec.slots is None else Aimd(self.most)
        self.turns = Turns(lanes) if spec.swaps and len(lanes) > 1 else None
        self._paused_until = -math.inf
        self._wanted_tokens = 1  # of the next call, as far as is known
        self._refused_at = -math.inf
        self._refused_in_a_row = 0
        self._told_limit: int | None = None
        self._told_at = -math.inf

    @property
    def limit(self) -> int:
        """Calls at once, now: what the server bears, shared with other processes, less what the GPU's other users need."""
        return math.floor(self._fair * self.gpu.share) if self.gpu else self._fair

    @property
    def _fair(self) -> int:
        """A told number of slots is divided among the processes; one that is found by measuring has felt the others already."""
        return self.concurrency.limit if self.spec.slots is None else max(1, self.concurrency.limit // self.sharers)

    @property
    def _everywhere(self) -> int:
        """Calls in flight, those of other processes included: each is taken to use its share as this one does."""
        return round(self.in_flight * self.concurrency.limit / self._fair)

    def why_not(self, now: float) -> Idle:
        if not self.breaker.admits:
            return "breaker"
        if self.gpu and self.gpu.silence_wanted(now):
            return "measuring"
        if self.in_flight >= self.limit:
            return "limit" if self.in_flight >= self._fair or not self.gpu else _gpu_reason(self.gpu)
        return "rate" if self.ready_at(now) > now else ""

    def ready_at(self, now: float) -> float:
        """When time alone next lets a call start."""
        moments = [self.rates.ready_at(now, self._wanted_tokens), self._paused_until]
        return max(*moments, self.breaker.opens_at) if self.breaker.down else max(moments)

    def claim(self, now: float, tokens: int) -> bool:
        """Start a call of about that many tokens; False: the rates allow none (another process may have been faster)."""
        if not self.rates.claim(now, tokens):
            self._wanted_tokens = tokens  # so many have to come free: by time, or because others took less than was thought
            self._paused_until = max(self._paused_until, now + _RACE_LOST_S)
            return False
        self._wanted_tokens = 1
        self.in_flight += 1
        self.breaker.started()
        return True

    def failed(self, now: float, started: float) -> None:
        """A call that started then got no answer."""
        self.unanswered_since = now if self.unanswered_since is None else self.unanswered_since
        if self.breaker.failed(now, started):
            self.concurrency.disturbed(now)

    def refused(self, now: float, started: float, wait_s: float) -> None:
        """429 or 503 to a call that started then and is over: too many at once, or, if later ones fare no better, a minute."""
        self.unanswered_since = now if self.unanswered_since is None else self.unanswered_since
        self.breaker.answered()
        self.concurrency.rejected(now, self._everywhere)
        if started > self._refused_at:  # it is news: what started before the last refusal belongs to the same burst
            self._refused_in_a_row += 1
            self._refused_at = now
        if self.in_flight == 0 or self._refused_in_a_row >= REFUSALS_TO_PAUSE:
            self._paused_until = max(self._paused_until, now + wait_s)

    def heard(self) -> None:
        """It answers, be it with a refusal that another call would not meet."""
        self.unanswered_since = None
        self.breaker.answered()

    def answered(self, now: float, started: float, usage: Usage, model: str) -> None:
        """An answer came to a call that started then; it still counts as in flight."""
        latency_s = now - started
        self.heard()
        if started >= self._refused_at:
            self._refused_in_a_row = 0
        tokens = usage.prompt_tokens + usage.completion_tokens + usage.thinking_tokens
        self.concurrency.answered(now, latency_s, max(1, tokens), self._everywhere)
        if self.spec.gpu and isinstance(self.spec.gpu.telemetry, LatencyTelemetry):
            self.spec.gpu.telemetry.observe(now, latency_s, max(1, usage.completion_tokens), self.in_flight, model)

    def limit_news(self, now: float) -> int | None:
        """The calls at once that it was found to bear, where that has clearly changed and was not told just now; else None."""
        found, told = self.concurrency.found, self._told_limit
        if found is None or now < self._told_at + _TELL_LIMIT_EVERY_S:
            return None
        if told is not None and abs(found - told) <= max(1, _HARDLY * told):
            return None
        self._told_limit, self._told_at = found, now
        return found


class LaneState:
    """One lane of a run."""

    def __init__(self, lane: Lane, endpoint: EndpointState) -> None:
        self.lane = lane
        self.endpoint = endpoint
        self.in_flight = 0
        self.ok = 0
        self.failed = 0
        self.usage = Usage()
        self.cost_usd = 0.0
        self.latency_s = lane.typical_s
        self.out_of_money = False  # no reservation fits until a call in flight is settled
        self.closed_by: Exception | None = None  # for good, in this run
        self.last_error: ProviderError | None = None
        self.idle: Idle = "no_work"
        self.idle_s: dict[str, float] = {}
        self._idle_since: float | None = None
        self._refusals = 0
        self._empty_days = 0

    @property
    def name(self) -> str:
        return self.lane.name

    def why_not(self, now: float) -> Idle:
        """Why it may not start a call now, as far as lane and endpoint alone decide; empty: it may."""
        if self.closed_by is not None:
            return "closed"
        if reason := self.endpoint.why_not(now):
            return reason
        if self.endpoint.turns and not self.endpoint.turns.allows(self.name):
            return "swap"
        return "budget" if self.out_of_money else ""

    def ready_at(self, now: float) -> float:
        """When time alone next lets it start a call; inf: time alone never does."""
        if self.closed_by is not None:
            return math.inf
        return self.endpoint.ready_at(now)

    def answered(self, latency_s: float, usage: Usage) -> None:
        self.ok += 1
        self._refusals = self._empty_days = 0
        known = self.latency_s
        self.latency_s = latency_s if known is None else known + _SMOOTHING * (latency_s - known)
        self.usage = Usage(
            prompt_tokens=self.usage.prompt_tokens + usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens + usage.completion_tokens,
            thinking_tokens=self.usage.thinking_tokens + usage.thinking_tokens,
            cached_tokens=self.usage.cached_tokens + usage.cached_tokens,
        )

    def unanswered(self, error: ProviderError) -> None:
        self.failed += 1
        self.last_error = error

    def refused(self, bad_request: bool) -> None:
        """The server will not do this one request. A lane that only ever calls requests wrong is closed."""
        self._refusals = self._refusals + 1 if bad_request else 0
        if self.ok == 0 and self._refusals >= REFUSALS_TO_DESPAIR:
            self.close_for_good(self.last_error or RuntimeError("refused"))

    def empty_day(self, error: ProviderError) -> None:
        """The quota of the day is used up. Days in which it never answered once close the lane."""
        self._empty_days += 1
        if self._empty_days >= EMPTY_DAYS_TO_DESPAIR:
            self.close_for_good(error)

    def close_for_good(self, error: Exception) -> None:
        self.closed_by = self.closed_by or error

    def note_idle(self, now: float, reason: Idle) -> bool:
        """Record why it takes no more work; time since the last note belongs to the reason of then. True: it has changed."""
        if self._idle_since is not None and self.idle:
            self.idle_s[self.idle] = self.idle_s.get(self.idle, 0.0) + now - self._idle_since
        self._idle_since = now
        changed = reason != self.idle
        self.idle = reason
        return changed

    def view(self) -> LaneView:
        return LaneView(
            name=self.name,
            model=self.lane.model,
            endpoint=self.endpoint.spec.key,
            paid=self.lane.paid,
            in_flight=self.in_flight,
            limit=self.endpoint.limit,
            ok=self.ok,
            failed=self.failed,
            idle=self.idle,
            idle_s=dict(self.idle_s),
            latency_s=self.latency_s,
            prompt_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens + self.usage.thinking_tokens,
            cost_usd=self.cost_usd,
            last_error=str(self.last_error or ""),
        )


def open_endpoints(lanes: Sequence[Lane]) -> list[LaneState]:
    """The states of lanes; those with equal endpoints share one."""
    by_key = {lane.endpoint.key: lane.endpoint for lane in lanes}
    states = {}
    for key, spec in by_key.items():
        users = [lane for lane in lanes if lane.endpoint.key == key]
        states[key] = EndpointState(spec, [lane.name for lane in users], own=users[0].own)
    return [LaneState(lane, states[lane.endpoint.key]) for lane in lanes]


def _gpu_reason(gpu: GpuShare) -> Idle:
    return "lease" if gpu.reason == "lease" else "threshold"
