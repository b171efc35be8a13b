"""A task in hand: the calls made for it, and what an error means for it, for its lane and for the lane's endpoint.

- Never worth a retry: 400, a request the server calls wrong.
- 429 and 503 are the endpoint's matter: they cost the task no attempt. A refused key and a missing model close the lane.
- What was refused costs nothing; what broke off may have been billed.
"""

import math
import random

import anyio

from agents.endpoints import LaneState
from agents.task import Completion, Outcome, Task
from config.errors import (
    AuthFailed,
    BadRequest,
    HafsError,
    ModelMissing,
    Overloaded,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
)

ATTEMPTS = 6
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 60.0
_MOST_DOUBLINGS = 7  # reach the longest; a task may be refused a thousand times
_STRAGGLER = 3.0  # times its lane's latency …
_STRAGGLER_LEAST_S = 2.0  # … and no less than this


class Call:
    """A task in hand, and the requests that run for it (two while one races a straggler)."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.attempts = 0
        self.setbacks = 0  # all retries, also those that cost no attempt
        self.not_before: dict[LaneState, float] = {}
        self.racing: dict[LaneState, anyio.CancelScope] = {}
        self.lane: LaneState | None = None  # the last one that was asked
        self.error: ProviderError | None = None
        self.cost_usd = 0.0
        self.cost_assumed = False
        self.won = False
        self._since: dict[LaneState, float] = {}
        self._alone = anyio.Event()

    def begin(self, lane: LaneState, now: float) -> anyio.CancelScope:
        self.attempts += 1
        self.lane = lane
        self._since[lane] = now
        scope = self.racing[lane] = anyio.CancelScope()
        return scope

    def leave(self, lane: LaneState) -> None:
        del self.racing[lane]
        if not self.racing:
            self._alone.set()

    async def win(self, lane: LaneState) -> bool:
        """The first answer wins: when this returns the other request is cancelled and its cost known. False: another won."""
        if self.won:
            return False
        self.won = True
        self.lane = lane
        for scope in self.racing.values():
            scope.cancel()
        if self.racing:
            self._alone = anyio.Event()
            with anyio.CancelScope(shield=True):
                await self._alone.wait()
        return True

    def straggles_at(self) -> float:
        """When its only request will have taken far longer than its lane usually does; inf: never, or there are two."""
        if len(self.racing) != 1 or self.attempts >= ATTEMPTS:
            return math.inf
        lane = next(iter(self.racing))
        return self._since[lane] + max(_STRAGGLER_LEAST_S, _STRAGGLER * lane.latency_s) if lane.latency_s else math.inf

    def outcome(self, completion: Completion | None, error: str = "") -> Outcome:
        lane = self.lane.lane if self.lane else None
        return Outcome(
            task=self.task,
            lane=lane.name if lane else "",
            provider=lane.provider.name if lane else "",
            attempt=self.attempts,
            completion=completion,
            error=error,
            reason=reason_of(self.error) if completion is None else "",
            cost_usd=self.cost_usd,
            cost_assumed=self.cost_assumed,
        )

    def heed(self, lane: LaneState, error: ProviderError, started: float, now: float) -> bool:
        """Tell the lane and its endpoint about an error. True: the task is worth another attempt."""
        self.error = error
        lane.unanswered(error)
        self.setbacks += 1
        wait_s = wait_of(error, self.setbacks)
        match error:
            case AuthFailed() | ModelMissing():
                lane.endpoint.heard()
                lane.close_for_good(error)
                self.attempts -= 1
            case RateLimited(per_day=True):
                lane.endpoint.heard()
                lane.endpoint.rates.exhaust_day(now)
                lane.empty_day(error)
                self.attempts -= 1
            case RateLimited() | Overloaded():
                lane.endpoint.refused(now, started, wait_s)
                self.attempts -= 1
            case ProviderUnavailable():
                lane.endpoint.failed(now, started)
            case _:
                lane.endpoint.heard()
                lane.refused(isinstance(error, BadRequest))
                return False
        self.not_before[lane] = now + wait_s
        return self.attempts < ATTEMPTS


def may_be_billed(error: HafsError) -> bool:
    if isinstance(error, ProviderUnavailable):
        return error.billable
    return not isinstance(error, RateLimited | AuthFailed | BadRequest)


def wait_of(error: ProviderError, setbacks: int) -> float:
    """What the server asks for, else exponential backoff; with so little jitter that every wait is longer than the last."""
    if isinstance(error, RateLimited | ProviderUnavailable) and error.retry_after_s is not None:
        return error.retry_after_s + random.uniform(0, min(1.0, error.retry_after_s / 4))
    return min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(setbacks - 1, _MOST_DOUBLINGS)) * random.uniform(0.8, 1.2)


def reason_of(error: ProviderError | None) -> str:
    """A short, stable word for reports."""
    words = {
        AuthFailed: "auth_failed",
        ModelMissing: "model_missing",
        RateLimited: "rate_limited",
        Overloaded: "overloaded",
        ProviderUnavailable: "unavailable",
        BadRequest: "bad_request",
    }
    return next((word for kind, word in words.items() if isinstance(error, kind)), "provider_error" if error else "cancelled")
