"""How much of its slots a lane takes while others use its GPU.

- What counts is foreign load: all of it less what the lane's own model server causes. Under `low` % all slots are taken, over
  `high` % nothing new is started, between the share falls linearly. What runs is always left to finish.
- A training job that has the GPU to itself (a lease) closes the lane at once, and its end opens it again.
- Where own load cannot be told apart, only readings taken after a second in which the lane had nothing in flight count.
- Readings are smoothed over some seconds, and each threshold is left only by a margin: a load that trembles around it does not
  make the lane open and close.
- Telemetry that is lost for long frees the lane: it is no reason to stand still.
"""

import math
import statistics
from collections import defaultdict, deque
from typing import Literal, Protocol

import anyio

from config.contracts.gpu import GpuReading

STALE_S = 30.0  # without a reading
_SMOOTHING_S = 3.0  # time in which a step of the load shows by two thirds
_MARGIN = 5.0  # of load, in %, but no more than a quarter of the way from low to high
_SILENCE_EVERY_S = 30.0
_SILENCE_COST = 10.0  # the next silence is this many times as long away as the last one took
_SETTLED_S = 1.0  # a GPU's utilization is a mean over up to a second
_RECENT_S = 15.0
_LEAST_ANSWERS = 5
_BEST_HOLDS_S = 600.0  # what was the best speed before may be another server's, or another day's


class Telemetry(Protocol):
    """Where readings come from. `read` returns soon, and None where nothing is known now; it raises nothing."""

    async def read(self) -> GpuReading | None: ...


Reason = Literal["", "threshold", "lease", "measuring", "stale"]


class GpuShare:
    """The share of its slots that a lane may take, from readings of its GPU. `low` and `high` are foreign load in %."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._margin = min(_MARGIN, (high - low) / 4)
        self._load: float | None = None  # foreign, smoothed, in %
        self._measured_at = -math.inf
        self._read_at = -math.inf
        self._leased = False
        self._stale = False
        self._zone: Literal["free", "between", "taken"] = "free"
        self._idle_since: float | None = None
        self._silence_at: float | None = None  # from then on a moment of silence is wanted
        self._now = -math.inf

    def take(self, now: float, reading: GpuReading | None, in_flight: int) -> None:
        """A reading just made (None: there was none), while the lane had so many calls in flight."""
        self._now = now
        if in_flight:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if reading is None:
            if now - self._read_at > STALE_S:
                self._forget(stale=self._read_at > -math.inf)
            return
        self._read_at, self._stale = now, False
        if reading.leased_to:
            self._forget()
            self._leased = True
            return
        self._leased = False
        if reading.foreign is not None:
            self._silence_at = None
            self._smooth(now, reading.foreign)
        elif self._in_silence(now):
            self._smooth(now, reading.utilization)

    @property
    def share(self) -> float:
        """0 to 1, of its slots."""
        if self._leased or self._zone == "taken":
            return 0.0
        if self._load is None or self._zone == "free":
            return 1.0
        return min(1.0, max(0.0, (self._high - self._load) / (self._high - self._low)))

    def silence_wanted(self, now: float) -> bool:
        """Whether to start nothing until the GPU has been seen without this lane's own load."""
        return self._silence_at is not None and now >= self._silence_at and now - self._read_at <= STALE_S

    @property
    def reason(self) -> Reason:
        """Why the lane takes less than all its slots; stale: it takes them all, for want of telemetry."""
        if self._leased:
            return "lease"
        if self.share < 1:
            return "threshold"
        if self.silence_wanted(self._now):
            return "measuring"
        return "stale" if self._stale else ""

    def _forget(self, *, stale: bool = False) -> None:
        self._load, self._zone, self._silence_at = None, "free", None
        self._leased, self._stale = False, stale

    def _in_silence(self, now: float) -> bool:
        """Whether a reading of now shows foreign load alone; says when that is wanted next."""
        wanted = self._silence_at = now if self._silence_at is None else self._silence_at
        if self._idle_since is None or now - self._idle_since < _SETTLED_S:
            return False
        self._silence_at = now + max(_SILENCE_EVERY_S, _SILENCE_COST * (now - wanted))
        return True

    def _smooth(self, now: float, foreign: float) -> None:
        weight = 1.0 if self._load is None else 1 - math.exp((self._measured_at - now) / _SMOOTHING_S)
        self._load = foreign if self._load is None else self._load + weight * (foreign - self._load)
        self._measured_at = now
        low = self._low + (self._margin if self._zone == "free" else 0)
        high = self._high - (self._margin if self._zone == "taken" else 0)
        self._zone = "taken" if self._load > high else "free" if self._load < low else "between"


class LatencyTelemetry:
    """Foreign load guessed from the lane's own speed, where no system tells it.

    It is 100 * (1 - best seconds a token / recent seconds a token), each a median over answers of one model with as many calls in
    flight. So a load that is there from the first answer on is not seen, and one that comes is seen once a few answers have been
    slow. Calls that began before the number in flight or the model had changed tell nothing: they waited, or a model was loaded.

    Args:
        better: is asked first; the guess fills in where it knows nothing.
    """

    def __init__(self, better: Telemetry | None = None) -> None:
        self._better = better
        self._speeds: defaultdict[tuple[str, int], _Speed] = defaultdict(_Speed)  # by model and calls in flight
        self._now = ("", 0)  # the model of late, and the most calls in flight
        self._peak_at = -math.inf
        self._changed_at = -math.inf

    def observe(self, now: float, latency_s: float, tokens: int, in_flight: int, model: str = "") -> None:
        """An answer of so many tokens came; `in_flight` counts its call still."""
        peak = self._now[1]
        # Answers that end together are told one after the other: each ran beside as many calls as the first of them.
        if in_flight >= peak or now - self._peak_at > latency_s:
            peak, self._peak_at = in_flight, now
        if (model, peak) != self._now:
            self._changed_at, self._now = now, (model, peak)
        if now - latency_s >= self._changed_at:
            self._speeds[self._now].add(now, latency_s / max(1, tokens))

    async def read(self) -> GpuReading | None:
        """None: too few answers lately."""
        if self._better is not None and (reading := await self._better.read()) is not None:
            return reading
        speed = self._speeds.get(self._now)
        foreign = speed.foreign(anyio.current_time()) if speed else None
        return None if foreign is None else GpuReading(utilization=foreign, own_share=0.0, source="latency")


class _Speed:
    """Seconds a token of one model with one number of calls in flight."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=16)
        self._best: deque[tuple[float, float]] = deque()  # medians and when, each better than all after it

    def add(self, now: float, seconds: float) -> None:
        self._recent.append((now, seconds))
        if len(self._recent) >= _LEAST_ANSWERS:
            usual = statistics.median(seconds for _, seconds in self._recent)
            while self._best and self._best[-1][1] >= usual:
                self._best.pop()
            self._best.append((now, usual))

    def foreign(self, now: float) -> float | None:
        recent = [seconds for when, seconds in self._recent if when > now - _RECENT_S]
        while self._best and self._best[0][0] < now - _BEST_HOLDS_S:
            self._best.popleft()
        if len(recent) < _LEAST_ANSWERS or not self._best:
            return None
        usual = statistics.median(recent)
        return 100.0 * max(0.0, 1 - self._best[0][1] / usual) if usual > 0 else None
