"""Random lanes and random faults: what the scheduler promises holds for all of them."""

import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agents import rates, tokens
from agents.budget import Budget
from agents.lanes import Endpoint, GpuThresholds, Lane
from agents.policy import Policy
from agents.prices import Price
from agents.scheduler import Scheduler
from agents.task import Completion, Outcome, Sampling, Task, Usage
from config.contracts.gpu import GpuReading
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, Blocked, ProviderError, ProviderUnavailable, RateLimited

FAULTS: list[ProviderError | None] = [
    None,  # hangs until the timeout
    RateLimited("429", retry_after_s=20),
    RateLimited("429"),
    RateLimited("the day", per_day=True),
    ProviderUnavailable("dropped"),
    ProviderUnavailable("503", billable=False),
    AuthFailed("key"),
    BadRequest("400"),
    Blocked("safety"),
]
ENDS_IN_ERROR = (ProviderUnavailable, RateLimited, AuthFailed, BadRequest)


@pytest.fixture(autouse=True, scope="module")
def days_of_an_hour() -> Iterator[None]:
    """A lane whose day is used up waits for the next one, and its GPU is looked at every two seconds meanwhile."""

    def day(moment: float) -> tuple[int, float, float]:
        number = int(moment // 3600)
        return number, 3600.0 * number, 3600.0 * (number + 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_pacific_day", day)
        yield


class Load:
    """What others do to a GPU: a load in % for STEP_S each, then nothing."""

    STEP_S, SETTLED_S, LOW, HIGH = 25.0, 15.0, 30.0, 60.0

    def __init__(self, steps: list[float]) -> None:
        self.steps = steps

    async def read(self) -> GpuReading | None:
        return GpuReading(utilization=self._at(anyio.current_time()), own_share=0.0, source="nvml")

    def _at(self, now: float) -> float:
        number = int(now // self.STEP_S)
        return self.steps[number] if number < len(self.steps) else 0.0

    @property
    def share(self) -> float:
        """Of its slots that a lane may take now; 1.0 also while a new load is not clear yet."""
        now = anyio.current_time()
        if now % self.STEP_S < self.SETTLED_S:
            return 1.0
        return min(1.0, max(0.0, (self.HIGH - self._at(now)) / (self.HIGH - self.LOW)))


class Unreliable:
    """A server that checks what it is promised: never more than its share of `slots` at once, nor `rpm` in 60 s."""

    def __init__(
        self,
        rng: random.Random,
        faults: list[int],
        fault_rate: float,
        slots: int,
        rpm: int | None,
        paid: bool,
        loads: list[float] | None,
    ) -> None:
        self.name = "gemini" if paid else "ollama"
        self.rng, self.faults, self.fault_rate, self.slots, self.rpm = rng, faults, fault_rate, slots, rpm
        self.gpu = None if loads is None or paid else Load(loads)
        self.in_flight = 0
        self.starts: list[float] = []
        self.most_billed = 0.0

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        self.in_flight += 1
        now = anyio.current_time()
        self.starts.append(now)
        assert self.in_flight <= self.slots * (self.gpu.share if self.gpu else 1)
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
        self.left = list(self.tasks)
        self.in_hand = 0
        self.most_in_hand = 0

    def next(self, domains: Collection[str]) -> Task | None:
        found = next((task for task in self.left if task.domain in domains), None)
        if found:
            self.left.remove(found)
            self.in_hand += 1
            self.most_in_hand = max(self.most_in_hand, self.in_hand)
        return found

    def remaining(self) -> int:
        return len(self.left)


def task(number: int, domain: str) -> Task:
    return Task(domain, "c", f"s{number}", (Message(role="user", content=f"prompt {number}"),), Sampling(max_tokens=20), 1, 0)


LANE = st.fixed_dictionaries(
    {
        "slots": st.integers(1, 6),
        "rpm": st.none() | st.integers(1, 30),
        "paid": st.booleans(),
        "faults": st.lists(st.integers(0, len(FAULTS) - 1), max_size=4),
        "fault_rate": st.sampled_from([0.05, 0.3, 1.0]),
        "loads": st.none() | st.lists(st.sampled_from([0.0, 20.0, 45.0, 90.0]), max_size=6),
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
@example(  # the paid lane leaves what is left of one domain to the free one, and of its own domain nothing is left
    lanes=[
        {"slots": 2, "rpm": None, "paid": True, "faults": [], "fault_rate": 0.05, "loads": None},
        {"slots": 1, "rpm": None, "paid": False, "faults": [], "fault_rate": 0.05, "loads": None},
    ],
    count=11,
    split=True,
    max_usd=None,
    store_s=0.0,
    drain_after=None,
    seed=0,
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
    servers = [Unreliable(rng, **spec) for spec in lanes]
    ways = [
        Lane(
            name=f"lane{n}",
            provider=server,
            model="m",
            endpoint=Endpoint(
                f"server{n}",
                queues=not spec["paid"],
                slots=server.slots,
                rpm=server.rpm,
                gpu=GpuThresholds(Load.LOW, Load.HIGH, server.gpu) if server.gpu else None,
            ),
            timeout_s=20,
            price=price if spec["paid"] else None,
            own=not spec["paid"],
        )
        for n, (server, spec) in enumerate(zip(servers, lanes, strict=True))
    ]
    every = [way.name for way in ways]
    routing = {"asm": every, "rom": ["lane0"] if split else every}
    source = Source(count, ["asm", "rom"])
    budget = Budget(max_usd)
    outcomes: list[Outcome] = []

    async def work() -> tuple[str, Exception | None]:
        scheduler = Scheduler(ways, routing, budget, Policy(give_up_s=600))

        async def store(outcome: Outcome) -> None:
            await anyio.sleep(store_s)
            source.in_hand -= 1
            outcomes.append(outcome)
            if len(outcomes) == drain_after:
                scheduler.drain()

        async with anyio.create_task_group() as beside:
            beside.start_soon(check_idle, scheduler, source, routing)
            try:
                return (await scheduler.run(source, store)).reason, None
            except ENDS_IN_ERROR as error:
                return "raised", error
            finally:
                beside.cancel_scope.cancel()

    reason, error = virtual(work)

    check_end(reason, error, outcomes, source, ways, lanes, drain_after, max_usd)
    check_outcomes(outcomes, "lane0" if split else "")
    check_limits(outcomes, source, servers, budget)


async def check_idle(scheduler: Scheduler, source: Source, routing: dict[str, list[str]]) -> None:
    """A lane with a free slot beside work that it may do has a recorded reason, at every moment that is looked at.

    That it never has more calls than it may is asserted by its server.
    """
    for look in range(200):
        await anyio.sleep(0.0371 * (1 + look / 20))
        for _ in range(30):  # all that happens at this moment has happened
            await anyio.lowlevel.checkpoint()
        domains = {task.domain for task in source.left}
        for view in scheduler.views():
            serves = any(view.name in routing[domain] for domain in domains)
            if serves and source.in_hand < 2 * sum(each.limit for each in scheduler.views()) and view.in_flight < view.limit:
                assert view.idle not in ("", "no_work"), view


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
