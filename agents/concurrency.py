"""How many calls at once an endpoint bears, found from its answers.

- A limit is at least 1 and at most `most`. Lowering it ends no running call.
- Nothing is learnt while fewer calls run than the limit allows: such a time raises no limit.
- Nothing here looks at a clock or waits: the caller says what happened, and when.

`Aimd` is for servers that say 429 where it is too much (and for a number of slots that was told: it starts there). `Gradient` is
for servers that queue without a word, where what is too much shows in nothing but the latency.
"""

import math

_SAME = 0.01  # of a latency: how much a call's start that is computed from its end may be off

# Aimd
_FIRST_PATIENCE_S = 1.0
_LONGEST_PATIENCE_S = 60.0
_LONGEST_BURST_S = 1.0
_ELSEWHERE = 0.1  # a ceiling that has moved by this share is another one

# Gradient
_START = 4
_GROWTH = 1.12  # twice the calls at once are worth it if they bring this many times the throughput
_ENOUGH = 0.90  # of the best throughput: the smallest limit that has it is wanted
_HOPELESS = 0.75  # of the best throughput: less than this is seen without many answers
_FULL = 0.85  # of the limit, on average: fewer calls in flight say nothing about it
_CHANGED = (0.7, 1.4)  # times the throughput found by the last search: outside, the world has changed
_LEAST_ANSWERS = 6
_RELATIVE_ERROR = 0.025
_HOLD_S = 10.0  # the least time between two searches …
_HOLD = 20.0  # … and how many times as long as a search it lasts
_LONGEST_HOLD = 8.0  # times as long again, where search after search finds the same
_CROWDED = 2.0  # times the seconds a token that the server once took: there are others, and no more is taken from them
_FORGETS = 1.05  # a search: the fastest it has ever been need not come again


class Aimd:
    """A limit for a server that answers 429 beyond what it serves at once.

    It starts at `most`. A 429 lowers it to what was being served; all 429s of one moment are one event. Above the ceiling so met
    it tries one call more, first after a second, then ever more rarely, and at once faster where the server takes them. A 429
    below what was proven lowers it by no more than half at a time, and the way back needs no patience: one 429 may be chance.
    """

    def __init__(self, most: int) -> None:
        self._most = self._limit = self._ceiling = most
        self._proven = 0  # the highest limit that a whole round of answers has borne out
        self._step = 1
        self._patience_s = _FIRST_PATIENCE_S
        self._anchor = 0  # the ceiling at which the patience began to grow
        self._grow_at = -math.inf
        self._burst_until = -math.inf
        self._burst_at_ceiling = False
        self._floor = 1
        self._latency_s = _LONGEST_BURST_S
        self._since = -math.inf  # of this round: answers to what was sent before do not count
        self._left = most  # answers until it is whole
        self._peak = 0  # most calls in flight in it

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def found(self) -> int | None:
        """How many it bears, once a ceiling was met and a whole round has borne it out; None: none was met."""
        return self._ceiling if self._proven == self._ceiling < self._most else None

    def answered(self, now: float, latency_s: float, tokens: int, in_flight: int) -> None:
        """An answer came; `in_flight` counts its call still."""
        self._latency_s = latency_s
        self._peak = max(self._peak, in_flight)
        if now - latency_s < self._since - _SAME * latency_s:
            return  # it was sent under another limit
        self._left -= 1
        if self._left <= 0:
            full = self._peak >= self._limit
            self._begin_round(now)
            if full:
                self._prove(now)

    def rejected(self, now: float, in_flight: int) -> None:
        """429: too many at once, with `in_flight` others being served or about to be refused as well."""
        if now > self._burst_until:
            self._begin_burst(now)
        self._limit = min(self._limit, max(in_flight, self._floor))
        if self._burst_at_ceiling:
            self._ceiling = self._limit
        self._begin_round(now)

    def disturbed(self, now: float) -> None:
        """What was sent before now proves nothing."""
        self._begin_round(now)

    def _begin_round(self, now: float) -> None:
        self._since, self._left, self._peak = now, self._limit, 0

    def _begin_burst(self, now: float) -> None:
        self._burst_until = now + min(_LONGEST_BURST_S, self._latency_s)
        self._burst_at_ceiling = self._limit > self._proven
        self._step = 1
        if self._burst_at_ceiling:
            self._floor = max(1, self._proven)
            far = abs(self._limit - self._anchor) > max(1, _ELSEWHERE * self._anchor)
            self._patience_s = _FIRST_PATIENCE_S if far else min(_LONGEST_PATIENCE_S, 2 * self._patience_s)
            self._anchor = self._limit if far else self._anchor
        else:
            self._floor = self._proven = max(1, self._limit // 2)
            self._ceiling = self._limit
        self._grow_at = now + self._patience_s

    def _prove(self, now: float) -> None:
        """A whole round went well with as many calls as the limit allows."""
        if self._limit > self._ceiling:
            self._patience_s = _FIRST_PATIENCE_S  # the ceiling is gone
        self._proven = self._limit
        self._ceiling = max(self._ceiling, self._limit)
        if self._limit < self._ceiling:
            self._limit = min(self._ceiling, self._limit + self._step)
        elif now >= self._grow_at:
            self._limit = min(self._most, self._limit + self._step)
        else:
            return
        self._step *= 2
        self._begin_round(now)


class Gradient:
    """A limit for a server that queues: the smallest one with nearly the best throughput, which is tokens a second.

    A search measures one limit after another: doubled while that pays, then halved and bisected as far as that costs nothing.
    It is repeated now and then, ever more rarely while it finds the same, and soon where the throughput has changed.
    """

    def __init__(self, most: int) -> None:
        self._most = self._ceiling = most
        self._limit = self._settled = min(_START, most)
        self._window = _Window(-math.inf)
        self._measured: dict[int, float] = {}  # limit -> throughput, in this search
        self._searching = True
        self._search_began = math.inf
        self._search_at = math.inf
        self._patience = 1.0
        self._expected: float | None = None  # throughput that the last search found
        self._fastest = math.inf  # seconds a token
        self._surprises = 0

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def found(self) -> int | None:
        """What the last search found; None: there was none yet, or one is under way."""
        return None if self._searching or self._expected is None else self._settled

    def answered(self, now: float, latency_s: float, tokens: int, in_flight: int) -> None:
        """An answer of so many tokens (prompt and completion) came; `in_flight` counts its call still."""
        self._search_began = min(self._search_began, now - latency_s)
        window = self._window
        window.take(now, latency_s, max(1, tokens), in_flight)
        if not window.complete(self._limit, _HOPELESS * max(self._measured.values(), default=0.0)):
            return
        self._window = _Window(now)
        if window.mean_in_flight < _FULL * self._limit:
            self._abandon(now)
        elif self._searching:
            self._note(now, window.throughput)
        else:
            self._watch(now, window.throughput)

    def rejected(self, now: float, in_flight: int) -> None:
        """The queue is full (503): far too many wait. A few calls are never that: then it is something else."""
        enough = max(_START, in_flight // 2)
        if enough < self._limit:
            self._ceiling = enough
            self._search(now, enough)

    def disturbed(self, now: float) -> None:
        """What was measured before now is not to be compared with what comes: another model may be answering."""
        self._fastest, self._expected = math.inf, None
        if self._searching and self._measured:
            self._search(now, _smallest_good(self._measured))
        else:
            self._window = _Window(now)

    def _go(self, now: float, limit: int) -> None:
        self._limit = limit
        self._window = _Window(now)

    def _search(self, now: float, limit: int) -> None:
        self._searching, self._search_began, self._measured = True, now, {}
        self._go(now, limit)

    def _note(self, now: float, throughput: float) -> None:
        self._measured[self._limit] = throughput
        top = max(self._measured)
        self._fastest = min(self._fastest, self._limit / throughput)
        crowded = top / self._measured[top] > _CROWDED * self._fastest
        following = next_limit(self._measured, top if crowded else self._ceiling)
        if following is not None:
            self._go(now, following)
            return
        found = _smallest_good(self._measured)
        self._patience = min(_LONGEST_HOLD, 2 * self._patience) if found == self._settled else 1.0
        self._expected = self._measured[found]
        self._settle(now, found)

    def _settle(self, now: float, limit: int) -> None:
        self._searching, self._surprises, self._measured = False, 0, {}
        self._settled = limit
        self._search_at = now + self._patience * max(_HOLD_S, _HOLD * (now - self._search_began))
        self._go(now, limit)

    def _abandon(self, now: float) -> None:
        """There is too little work to learn from; a search that has begun is given up."""
        if self._searching and self._limit != self._settled:
            self._settle(now, self._settled)

    def _watch(self, now: float, throughput: float) -> None:
        self._expected = throughput if self._expected is None else self._expected
        low, high = (self._expected * factor for factor in _CHANGED)
        self._surprises = 0 if low <= throughput <= high else self._surprises + 1
        if self._surprises >= 2:
            self._patience = 1.0
        elif now < self._search_at:
            return
        self._ceiling = min(self._most, 2 * self._ceiling)
        self._fastest *= _FORGETS
        self._search(now, self._limit)
        self._note(now, throughput)


def next_limit(measured: dict[int, float], most: int) -> int | None:
    """The limit to measure next, from throughputs by limit (at least one); None: the best one is found."""
    top = max(measured)
    others = [throughput for limit, throughput in measured.items() if limit != top]
    if top < most and (not others or measured[top] >= _GROWTH * max(others)):
        return min(most, max(_START, 2 * top))  # 1 and 2 may be equally slow where 4 is not
    good = _smallest_good(measured)
    below = max((limit for limit in measured if limit < good), default=0)
    return (below + good) // 2 if good - below > max(1, good // 8) else None


def _smallest_good(measured: dict[int, float]) -> int:
    best = max(measured.values())
    return min(limit for limit, throughput in measured.items() if throughput >= _ENOUGH * best)


class _Window:
    """Answers to calls that began and ended under one limit, after the server has come to rest under it."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._rested = math.inf  # the first call that began since has ended: later ones meet what is usual under this limit
        self._last = 0.0
        self._call_s = 0.0  # integral of the calls in flight over time
        self._answers = 0
        # Sums over the answers. Seconds a token of one call = seconds / tokens; its error follows from the squares.
        self._seconds = self._tokens = self._seconds2 = self._tokens2 = self._products = 0.0

    def take(self, now: float, latency_s: float, tokens: int, in_flight: int) -> None:
        began, same = now - latency_s, _SAME * latency_s
        if self._rested == math.inf:
            if began >= self._since - same:
                self._rested = self._last = now
            return
        self._call_s += (now - self._last) * in_flight
        self._last = now
        if began >= self._rested - same:
            self._answers += 1
            self._seconds += latency_s
            self._tokens += tokens
            self._seconds2 += latency_s**2
            self._tokens2 += tokens**2
            self._products += latency_s * tokens

    def complete(self, limit: int, hopeless: float) -> bool:
        """Enough answers for a good mean, or for being sure that the throughput is below `hopeless`."""
        if self._answers < max(_LEAST_ANSWERS, limit):
            return self._answers >= max(2, limit) and self.throughput < hopeless
        return self._relative_error <= _RELATIVE_ERROR or self._answers >= 4 * max(8, limit)

    @property
    def mean_in_flight(self) -> float:
        elapsed = self._last - self._rested
        return self._call_s / elapsed if elapsed > 0 else 0.0

    @property
    def throughput(self) -> float:
        """Tokens a second, by Little's law: calls in flight / seconds a token of one call."""
        return self.mean_in_flight * self._tokens / self._seconds if self._seconds else 0.0

    @property
    def _relative_error(self) -> float:
        """Standard error of the ratio of two means, as a share of it. Source: Cochran, Sampling Techniques, 1977, 6.4."""
        ratio = self._seconds / self._tokens
        residuals = self._seconds2 - 2 * ratio * self._products + ratio**2 * self._tokens2
        return math.sqrt(max(0.0, residuals)) / self._seconds if self._seconds else 0.0
