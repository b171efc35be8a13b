"""Lanes: ways to a model, and how much work each may take now.

- A lane never has more than `slots` calls in flight, and never starts more than `rpm` in any 60 s.
- Lowering its limit never ends running work.
- 429: the limit falls to what the server was still serving, and grows by one with every round of answers.
- Five calls in a row without an answer close the lane for a while, twice as long each time; then one call at a time tries it.
"""

import math
from collections import deque
from dataclasses import dataclass

from agents.prices import OWN_MACHINES, Price
from agents.providers.base import Provider
from config.errors import ConfigError, ProviderError

FAILURES_TO_CLOSE = 5
_FIRST_CLOSURE_S = 1.0
_LONGEST_CLOSURE_S = 60.0
# The server counts requests as they arrive: two that leave 60 s apart may arrive a little closer.
_WINDOW_S = 60.25


@dataclass(frozen=True)
class Lane:
    """`slots`: calls at once. `rpm`: calls started in any 60 s. `price` None: free, if the provider is one's own machine."""

    name: str
    provider: Provider
    model: str
    slots: int
    timeout_s: float = 120.0
    rpm: int | None = None
    price: Price | None = None

    def __post_init__(self) -> None:
        if self.slots < 1 or (self.rpm is not None and self.rpm < 1):
            raise ConfigError(f'lane "{self.name}": slots and rpm start at 1', hint="leave the lane out to use none of it")

    @property
    def paid(self) -> bool:
        return self.price is not None or self.provider.name not in OWN_MACHINES


class RpmWindow:
    """Starts at most `rpm` calls in any 60 s; None: no limit. Times are those of the caller's clock, in seconds."""

    def __init__(self, rpm: int | None) -> None:
        self._starts: deque[float] | None = deque(maxlen=rpm) if rpm else None

    def ready_at(self) -> float:
        if self._starts is None or len(self._starts) < (self._starts.maxlen or 0):
            return -math.inf
        return self._starts[0] + _WINDOW_S

    def started(self, now: float) -> None:
        if self._starts is not None:
            self._starts.append(now)


class LaneState:
    """What a scheduler knows of one lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.in_flight = 0
        self.ok = 0
        self.out_of_money = False  # no reservation fits until a call in flight is settled
        self.closed_by: Exception | None = None  # for good, in this run
        self.last_error: ProviderError | None = None
        self.failing_since: float | None = None  # first of the calls in a row that got no answer
        self._failures = 0
        self._bad_requests = 0
        self._closure_s = _FIRST_CLOSURE_S
        self._limit = float(lane.slots)
        self._opens_at = -math.inf
        self._window = RpmWindow(lane.rpm)

    @property
    def down(self) -> bool:
        """It gave no answer to the last calls; while it is down it is only tried."""
        return self._failures >= FAILURES_TO_CLOSE

    @property
    def hopeless(self) -> bool:
        """It has only ever said that the request is wrong: the model is missing, or the request is never right."""
        return self.ok == 0 and self._bad_requests >= FAILURES_TO_CLOSE

    @property
    def limit(self) -> int:
        return int(self._limit)

    def ready_at(self) -> float:
        """When it may start a call, as far as time alone decides; inf: never again in this run."""
        return math.inf if self.closed_by else max(self._opens_at, self._window.ready_at())

    def has_room(self, now: float) -> bool:
        return self.in_flight < self.limit and not self.out_of_money and self.ready_at() <= now

    def started(self, now: float) -> None:
        self.in_flight += 1
        self._window.started(now)

    def answered(self) -> None:
        self.ok += 1
        self._recovered()
        self._limit = min(self.lane.slots, self._limit + 1 / self._limit)

    def rate_limited(self, error: ProviderError, now: float, wait_s: float) -> None:
        self._failed(error)
        self._recovered()
        self._limit = min(self._limit, max(1, self.in_flight))
        if self.in_flight == 0:  # not too many at once, but too many a minute: nothing else will be served either
            self._opens_at = now + wait_s

    def unavailable(self, error: ProviderError, now: float) -> None:
        self._failed(error)
        self._failures += 1
        if self.failing_since is None:
            self.failing_since = now
        if self.down and now >= self._opens_at:  # the calls that were in flight when it closed do not close it again
            self._opens_at = now + self._closure_s
            self._closure_s = min(_LONGEST_CLOSURE_S, 2 * self._closure_s)
            self._limit = 1.0

    def refused(self, error: ProviderError, *, bad_request: bool) -> None:
        """The server answered that it will not do this one call."""
        self._failed(error)
        self._recovered()
        self._bad_requests = self._bad_requests + 1 if bad_request else 0

    def close_for_good(self, error: Exception) -> None:
        self.closed_by = self.closed_by or error

    def _failed(self, error: ProviderError) -> None:
        self.last_error = error

    def _recovered(self) -> None:
        """It answers, be it with a refusal."""
        self._failures = 0
        self._closure_s = _FIRST_CLOSURE_S
        self.failing_since = None
