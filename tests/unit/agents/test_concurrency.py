"""Limits found on models of servers, in a time of their own: a heap of events, no clock and no waiting."""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.concurrency import Aimd, Gradient, next_limit

TOKENS = 100
Pace = Callable[[int], float]  # seconds an answer of TOKENS takes with so many being answered


@dataclass
class Server:
    """Answers `par` at once, first come first served. `cap`: 429 beyond so many in it; `queue`: 503 beyond so many waiting."""

    pace: Pace
    par: int = 10**6
    cap: int = 10**6
    queue: int = 10**6
    noise: float = 0.0  # each latency is off by up to this share
    lengths: tuple[float, float] = (1.0, 1.0)  # answers' lengths, times TOKENS
    others: int = 0  # calls of another user that are always there


@dataclass
class Load:
    """A scheduler's view: as many calls as the limit allows, and `wanted` at most. Refused calls come back a second later."""

    limit: Aimd | Gradient
    server: Server
    wanted: int = 10**6
    seed: int = 0
    now: float = 0.0
    answers: int = 0
    peak: int = 0
    refusals: list[float] = field(default_factory=list)
    limits: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._events: list[tuple[float, int, str, float, float]] = []
        self._serial = 0
        self._queue: deque[tuple[str, float, float]] = deque()
        self._active = 0
        self._away = 0
        self.in_flight = 0
        self._here = 0  # others' calls in the server

    def run(self, until: Callable[["Load"], bool]) -> "Load":
        while not until(self):
            self._top_up()
            self.now, _, kind, sent, tokens = heapq.heappop(self._events)
            if kind == "back":
                self._away -= 1
                continue
            if kind == "refused":
                self.in_flight -= 1
                self._away += 1
                self._at(self.now + 1.0 + self._random.random() / 4, "back")
                self.limit.rejected(self.now, self.in_flight)
                self.refusals.append(self.now)
            else:
                self._answered(kind, sent, tokens)
            self.limits.append((self.now, self.limit.limit))
        return self

    def _top_up(self) -> None:
        while self.in_flight < min(self.limit.limit, self.wanted - self._away):
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            self._send("ours")
        while self._here < self.server.others:
            self._here += 1
            self._send("others")

    def _send(self, who: str) -> None:
        server = self.server
        if self._active + len(self._queue) >= server.cap or len(self._queue) >= server.queue:
            self._at(self.now + 0.003, "refused")
            return
        self._queue.append((who, self.now, TOKENS * self._random.uniform(*server.lengths)))
        self._serve()

    def _serve(self) -> None:
        server = self.server
        while self._queue and self._active < server.par:
            self._active += 1
            who, sent, tokens = self._queue.popleft()
            seconds = server.pace(min(server.par, self._active + len(self._queue))) * tokens / TOKENS
            self._at(self.now + seconds * self._random.uniform(1 - server.noise, 1 + server.noise), who, sent, tokens)

    def _answered(self, who: str, sent: float, tokens: float) -> None:
        self._active -= 1
        if who == "ours":
            self.limit.answered(self.now, self.now - sent, round(tokens), self.in_flight)
            self.in_flight -= 1
            self.answers += 1
        else:
            self._here -= 1
        self._serve()

    def _at(self, when: float, what: str, sent: float = 0.0, tokens: float = 0.0) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, what, sent, tokens))

    def usual(self, begin: float, end: float) -> int:
        """The limit that held for the longest part of a time."""
        held: Counter[int] = Counter()
        for (since, limit), (until, _) in zip(self.limits, self.limits[1:], strict=False):
            held[limit] += max(0, round(1e6 * (min(until, end) - max(since, begin))))
        return held.most_common(1)[0][0]


def constant(_: int) -> float:
    return 0.2


def alone(active: int) -> float:
    """All the power goes to whoever is being answered: two at once take twice as long."""
    return 0.2 * active


def two_cores(active: int) -> float:
    """An Ollama with four slots on two cores: 3.5, 3.5, 4.4, 5.2 answers a second with 1, 2, 3, 4 at once."""
    return active / (3.5, 3.5, 4.4, 5.2)[min(active, 4) - 1]


def batched(active: int) -> float:
    """A vLLM-like server: one more in the batch costs little, up to 64."""
    return 0.5 * (1 + active / 256) * max(1.0, active / 64)


def seconds(count: float) -> Callable[[Load], bool]:
    return lambda load: load.now >= count


# --- servers that answer 429 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_cap_is_met_once_and_then_hardly_ever(noise: float) -> None:
    load = Load(Aimd(128), Server(constant, cap=32, noise=noise), wanted=128)
    load.run(lambda load: load.answers >= 2000)
    ideal = 2000 / 32 * 0.2
    later = [when for when in load.refusals if when > 1.0]
    assert load.now <= 1.10 * ideal
    assert len(later) < 0.03 * 2000


def test_a_burst_of_one_moment_counts_once() -> None:
    limit = Aimd(128)
    for left in range(127, 31, -1):
        limit.rejected(0.0, left)
    assert limit.limit == 32
    served(limit, 0.2, 32)
    assert limit.limit == 32, "it was a ceiling: a second passes first"
    served(limit, 1.2, 32)
    assert limit.limit == 33


def test_a_ceiling_is_tried_ever_more_rarely() -> None:
    load = Load(Aimd(128), Server(constant, cap=32), wanted=128).run(seconds(200))
    tries = [when for when in load.refusals if when > 1.0]
    assert 5 <= len(tries) <= 12
    assert tries[-1] - tries[-2] > 30
    assert load.usual(100, 200) == 32


def test_a_server_that_serves_more_is_found_out_and_one_that_serves_less_is_spared() -> None:
    load = Load(Aimd(128), Server(constant, cap=16), wanted=128).run(seconds(5))
    assert load.limit.limit in (16, 17)
    load.server.cap = 64
    load.run(seconds(20))
    assert 60 <= load.limit.limit <= 66
    load.server.cap = 8
    load.run(seconds(25))
    assert load.limit.limit in (8, 9)
    before = len(load.refusals)
    load.run(seconds(45))
    assert len(load.refusals) - before <= 8


@pytest.mark.parametrize("chance", [0.01, 0.05])
def test_429s_by_chance_do_not_strangle(chance: float) -> None:
    limit, draws = Aimd(32), random.Random(1)
    done = 0
    for round_ in range(500):
        now = 0.2 * round_
        refused = sum(draws.random() < chance for _ in range(limit.limit))
        for index in range(refused):
            limit.rejected(now + 0.001, max(0, limit.limit - 1 - index))
        done += served(limit, now + 0.2, limit.limit)
    assert done / 500 >= (24 if chance == 0.01 else 6)


def test_too_little_work_proves_nothing() -> None:
    limit = Aimd(64)
    for left in range(63, 15, -1):
        limit.rejected(0.0, left)
    for second in range(1, 100):
        for _ in range(20):
            limit.answered(float(second), 0.2, TOKENS, 4)
    assert limit.limit == 16


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans(), st.integers(0, 200)), max_size=200), st.integers(1, 130))
def test_a_limit_stays_within_its_bounds(events: list[tuple[float, bool, int]], most: int) -> None:
    limits: list[Aimd | Gradient] = [Aimd(most), Gradient(most)]
    now = 0.0
    for passed, rejected, in_flight in events:
        now += passed
        for limit in limits:
            if rejected:
                limit.rejected(now, in_flight)
            else:
                limit.answered(now, passed, in_flight, max(1, in_flight))
            if in_flight == 100:
                limit.disturbed(now)
            assert 1 <= limit.limit <= most


def served(limit: Aimd, now: float, count: int) -> int:
    for left in range(count, 0, -1):
        limit.answered(now, 0.199, TOKENS, left)
    return count


# --- servers that queue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_four_slots_are_found_in_seconds(noise: float, seed: int) -> None:
    load = Load(Gradient(128), Server(constant, par=4, queue=32, noise=noise), seed=seed).run(seconds(60))
    assert 4 <= load.usual(3, 10) <= 6
    assert 4 <= load.usual(10, 60) <= 6
    assert load.peak <= 36 and not load.refusals
    assert load.answers >= 0.93 * 60 / 0.2 * 4


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("par", [1, 100])
def test_a_server_that_gains_nothing_from_more_gets_one_or_two(par: int, seed: int) -> None:
    load = Load(Gradient(128), Server(constant if par == 1 else alone, par=par, noise=0.2), seed=seed).run(seconds(120))
    assert load.usual(20, 120) <= 3
    assert load.peak <= 16


def test_it_ends_at_one_or_two_where_nothing_trembles() -> None:
    load = Load(Gradient(128), Server(constant, par=1)).run(seconds(120))
    assert load.usual(15, 120) in (1, 2)


@pytest.mark.parametrize("seed", range(10))
def test_a_plateau_between_one_and_two_is_crossed(seed: int) -> None:
    """From a limit of 1, too: that is where it stood while somebody else had the machine."""
    load = Load(Gradient(128), Server(two_cores, par=4, noise=0.2), seed=seed).run(seconds(60))
    assert 4 <= load.usual(20, 60) <= 6
    crossing = Load(Gradient(1), Server(two_cores, par=4, noise=0.2), seed=seed).run(seconds(20))
    assert crossing.limit.limit == 1
    assert next_limit({1: 3.5}, 128) == 4


@pytest.mark.parametrize("seed", range(5))
def test_a_server_that_scales_to_64_is_filled(seed: int) -> None:
    load = Load(Gradient(128), Server(batched, noise=0.2), seed=seed).run(seconds(60))
    assert 48 <= load.usual(20, 60) <= 80


@pytest.mark.parametrize("slots", [2, 3, 5, 6, 8, 12, 16])
def test_any_number_of_slots_gives_nearly_all_of_the_throughput(slots: int) -> None:
    load = Load(Gradient(128), Server(constant, par=slots, noise=0.1)).run(seconds(100))
    found = load.usual(20, 100)
    assert 0.88 * slots <= found <= 2 * slots
    assert load.answers >= 0.88 * slots * 100 / 0.2


@pytest.mark.parametrize("seed", range(5))
def test_answers_of_different_lengths_do_not_mislead(seed: int) -> None:
    server = Server(constant, par=4, noise=0.2, lengths=(0.1, 3.0))
    load = Load(Gradient(128), server, seed=seed).run(seconds(200))
    assert 4 <= load.usual(40, 200) <= 7
    assert load.peak <= 36


def test_a_slow_beginning_is_forgotten() -> None:
    cold = Server(lambda active: 2.0, par=4)
    load = Load(Gradient(128), cold).run(seconds(2.5))
    load.server.pace = constant
    load.run(seconds(120))
    assert 4 <= load.usual(60, 120) <= 6


def test_a_swap_of_models_is_not_measured() -> None:
    plain = Load(Gradient(128), Server(constant, par=4)).run(seconds(5))
    limit = Gradient(128)
    swapping = Load(limit, Server(constant, par=4)).run(seconds(0.5))
    swapping.server.pace = lambda active: 3.0
    limit.disturbed(swapping.now)
    swapping.run(seconds(1.0))
    swapping.server.pace = constant
    swapping.run(seconds(15))
    assert plain.limit.limit == 4
    assert 4 <= swapping.usual(10, 15) <= 6


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_too_little_work_raises_no_limit(wanted: int) -> None:
    load = Load(Gradient(128), Server(constant, par=64), wanted=wanted).run(seconds(300))
    assert load.limit.limit == 4 and load.peak == wanted


def test_another_user_comes_and_goes() -> None:
    load = Load(Gradient(128), Server(constant, par=8, noise=0.1)).run(seconds(30))
    assert 7 <= load.limit.limit <= 10
    load.server.others = 8
    load.run(seconds(60))
    assert load.peak <= 64
    load.server.others = 0
    load.run(seconds(400))
    assert 7 <= load.usual(250, 400) <= 10


def test_searches_cost_little() -> None:
    load = Load(Gradient(128), Server(constant, par=4, noise=0.1)).run(seconds(50))
    before = load.answers
    load.run(seconds(350))
    assert load.answers - before >= 0.97 * 300 / 0.2 * 4


def test_a_full_queue_is_left_at_once() -> None:
    limit = Gradient(128)
    load = Load(limit, Server(batched, queue=10**6)).run(seconds(30))
    load.server.pace, load.server.par, load.server.queue = constant, 4, 8
    load.run(seconds(90))
    assert load.usual(40, 90) <= 8
    assert len([when for when in load.refusals if when > 35]) <= 8


def test_a_503_to_a_few_calls_is_something_else() -> None:
    limit = Gradient(128)
    for second in range(20):
        limit.rejected(float(second), 3)
    assert limit.limit == 4
