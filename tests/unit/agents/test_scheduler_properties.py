"""Random lanes and random faults: what the scheduler promises holds for all of them."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import tokens
from agents.budget import Budget
from agents.lanes import Lane
from agents.prices import Price
from agents.scheduler import Scheduler
from agents.task import Completion, Outcome, Sampling, Task, Usage
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, Blocked, ProviderError, ProviderUnavailable, RateLimited

FAULTS: list[ProviderError | None] = [
    None,  # hangs until the timeout
    RateLimited("429", retry_after_s=2),
    RateLimited("429"),
    RateLimited("the day", per_day=True),
    ProviderUnavailable("dropped"),
    ProviderUnavailable("503", billable=False),
    AuthFailed("key"),
    BadRequest("400"),
    Blocked("safety"),
]
ENDS_IN_ERROR = (ProviderUnavailable, RateLimited, AuthFailed, BadRequest)


class Unreliable:
    """A server that checks what it is promised: never more than `slots` at once, never more than `rpm` in 60 s."""

    def __init__(self, rng: random.Random, faults: list[int], fault_rate: float, slots: int, rpm: int | None, paid: bool) -> None:
        self.name = "gemini" if paid else "ollama"
        self.rng, self.faults, self.fault_rate, self.slots, self.rpm = rng, faults, fault_rate, slots, rpm
        self.in_flight = 0
        self.starts: list[float] = []
        self.most_billed = 0.0

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        self.in_flight += 1
        now = anyio.current_time()
        self.starts.append(now)
        assert self.in_flight <= self.slots
        assert self.rpm is None or len([at for at in self.starts if at > now - 60]) <= self.rpm
        try:
            await anyio.sleep(self.rng.choice([0.0, 0.1, 3.0]))
            if self.faults and self.rng.random() < self.fault_rate:
                fault = FAULTS[self.rng.choice(self.faults)]
                if fault is None:
                    await anyio.sleep(1000)
                raise fault or AssertionError
            most = tokens.at_most(messages)
            usage = Usage(prompt_tokens=self.rng.randint(1, most), completion_tokens=self.rng.randint(1, sampling.max_tokens))
            return Completion("ok", "stop", usage, model, 0.1)
        finally:
            self.in_flight -= 1

    def stream(self, *_: Any) -> Any: ...

    async def models(self) -> list[str]:
        return []

    async def aclose(self) -> None: ...


class Source:
    def __init__(self, count: int, domains: list[str]) -> None:
        self.tasks = [task(n, domains[n % len(domains)]) for n in range(count)]
        self.next_one = 0
        self.in_hand = 0
        self.most_in_hand = 0

    def next(self) -> Task | None:
        if self.next_one == len(self.tasks):
            return None
        self.next_one += 1
        self.in_hand += 1
        self.most_in_hand = max(self.most_in_hand, self.in_hand)
        return self.tasks[self.next_one - 1]


def task(number: int, domain: str) -> Task:
    return Task(domain, "c", f"s{number}", (Message(role="user", content=f"prompt {number}"),), Sampling(max_tokens=20), 1, 0)


LANE = st.fixed_dictionaries(
    {
        "slots": st.integers(1, 6),
        "rpm": st.none() | st.integers(1, 30),
        "paid": st.booleans(),
        "faults": st.lists(st.integers(0, len(FAULTS) - 1), max_size=4),
        "fault_rate": st.sampled_from([0.05, 0.3, 1.0]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    lanes=st.lists(LANE, min_size=1, max_size=3),
    count=st.integers(0, 60),
    split=st.booleans(),
    max_usd=st.none() | st.floats(0.0, 0.05),
    store_s=st.sampled_from([0.0, 0.05]),
    drain_after=st.none() | st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_promises(
    virtual: Any,
    lanes: list[dict[str, Any]],
    count: int,
    split: bool,
    max_usd: float | None,
    store_s: float,
    drain_after: Any,
    seed: int,
) -> None:
    rng = random.Random(seed)
    price = Price(1e-5, 1e-4)
    servers = [Unreliable(rng, spec["faults"], spec["fault_rate"], spec["slots"], spec["rpm"], spec["paid"]) for spec in lanes]
    ways = [
        Lane(f"lane{n}", server, "m", server.slots, timeout_s=20, rpm=server.rpm, price=price if spec["paid"] else None)
        for n, (server, spec) in enumerate(zip(servers, lanes, strict=True))
    ]
    routing = {"rom": ["lane0"]} if split else {}
    source = Source(count, ["asm", "rom"])
    budget = Budget(max_usd)
    outcomes: list[Outcome] = []

    async def work() -> tuple[str, Exception | None]:
        scheduler = Scheduler(ways, routing, budget)

        async def store(outcome: Outcome) -> None:
            await anyio.sleep(store_s)
            source.in_hand -= 1
            outcomes.append(outcome)
            if len(outcomes) == drain_after:
                scheduler.drain()

        try:
            return (await scheduler.run(source, store)).reason, None
        except ENDS_IN_ERROR as error:
            return "raised", error

    reason, error = virtual(work)

    check_end(reason, error, outcomes, source, ways, lanes, drain_after, max_usd)
    check_outcomes(outcomes, "lane0" if split else "")
    check_limits(outcomes, source, servers, budget)


def check_end(
    reason: str,
    error: Exception | None,
    outcomes: list[Outcome],
    source: Source,
    ways: list[Lane],
    specs: list[dict[str, Any]],
    drain_after: int | None,
    max_usd: float | None,
) -> None:
    times = Counter(outcome.task.id for outcome in outcomes)
    assert not times or max(times.values()) == 1
    faultless = not any(spec["faults"] for spec in specs)
    match reason:
        case "done":
            assert set(times) == {task.id for task in source.tasks}
        case "drained":
            assert drain_after is not None
        case "budget":
            assert max_usd is not None and any(way.paid for way in ways)
        case "raised":
            assert not faultless, error
    assert not faultless or all(outcome.completion for outcome in outcomes)


def check_outcomes(outcomes: list[Outcome], lane_of_rom: str) -> None:
    for outcome in outcomes:
        assert bool(outcome.error) is (outcome.completion is None)
        assert 1 <= outcome.attempt <= 6
        assert outcome.task.domain != "rom" or not lane_of_rom or outcome.lane == lane_of_rom


def check_limits(outcomes: list[Outcome], source: Source, servers: list[Unreliable], budget: Budget) -> None:
    assert source.most_in_hand <= 2 * sum(server.slots for server in servers)
    assert all(server.in_flight == 0 for server in servers)
    assert budget.max_usd is None or budget.spent_usd <= budget.max_usd + 1e-9
    assert budget.outstanding == 0
    assert abs(sum(outcome.cost_usd for outcome in outcomes) - budget.spent_usd) < 1e-9
