"""The budget under the real scheduler: 200 random prices, latencies and faults. It is never passed, and it is used up."""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest

from agents.budget import Budget, worst_case
from agents.lanes import Endpoint, Lane
from agents.prices import Price
from agents.scheduler import Scheduler
from agents.simulated import Behaviour, SimulatedServer
from agents.task import Outcome, Sampling, Task
from config.contracts.sample import Message

SCENARIOS = 200
PASSING = ("dropped", "503", "429", "429_wait")  # faults after which a lane goes on
SHARE_TO_USE = 0.97
CALLS_OF_A_CAP = 100  # worst-case calls from which nearly all of it has to be used


class Endless:
    """Tasks of all lengths, for ever: work always remains."""

    def __init__(self, rng: random.Random, domains: list[str], sampling: Sampling, longest: int) -> None:
        self._rng, self._domains, self._sampling, self._longest = rng, domains, sampling, longest
        self.handed_out = 0

    def next(self, domains: Collection[str]) -> Task | None:
        self.handed_out += 1
        text = "x" * self._rng.randint(1, self._longest)
        domain = self._rng.choice([name for name in self._domains if name in domains])
        return Task(domain, "c", f"s{self.handed_out}", (prompt(text),), self._sampling, 1, 0)

    def remaining(self) -> int:
        return 10_000


def prompt(text: str) -> Message:
    return Message(role="user", content=text)


@dataclass
class Scenario:
    lanes: list[Lane]
    servers: list[SimulatedServer]
    source: Endless
    routes: dict[str, list[str]]
    max_usd: float
    worst_calls: float  # how many worst-case calls the cap has room for


def scenario(number: int) -> Scenario:
    rng = random.Random(number)
    sampling = Sampling(max_tokens=rng.randint(20, 300))
    longest = rng.choice([20, 60])
    lanes, servers = [], []
    for place in range(rng.randint(1, 3)):
        price = any_price(rng)
        behaviour = any_behaviour(rng, sampling.max_tokens)
        server = SimulatedServer(behaviour, name=f"vendor{place}", seed=number, prices={"m": price})
        slots, rpm = rng.choice([None, 1, 4, 32]), rng.choice([None, None, 120])
        endpoint = Endpoint(f"vendor{place}", queues=False, slots=slots, rpm=rpm)
        thinking = behaviour.thinking_tokens
        lanes.append(Lane(f"lane{place}", server, "m", endpoint, price=price, own=False, thinking_tokens=thinking))
        servers.append(server)
    worst = max(
        worst_case(lane.price or any_price(rng), [prompt("x" * longest)], sampling, lane.thinking_tokens) for lane in lanes
    )
    calls = rng.uniform(CALLS_OF_A_CAP, 1.3 * CALLS_OF_A_CAP) if number % 2 else rng.uniform(0, CALLS_OF_A_CAP)
    names = [lane.name for lane in lanes]
    routes = {"asm": names, "rom": [rng.choice(names)]} if rng.random() < 0.5 else {"asm": names}
    return Scenario(lanes, servers, Endless(rng, list(routes), sampling, longest), routes, calls * worst, calls)


def any_price(rng: random.Random) -> Price:
    """Tiers begin within the prompts of the test, so that they matter."""
    input_usd, output_usd = 10 ** rng.uniform(-8, -5), 10 ** rng.uniform(-7, -4)
    tiers = ((rng.randint(5, 60), Price(2 * input_usd, 1.5 * output_usd)),) if rng.random() < 0.3 else ()
    return Price(input_usd, output_usd, rng.choice([None, input_usd / 10]), tiers)


def any_behaviour(rng: random.Random, max_tokens: int) -> Behaviour:
    return Behaviour(
        latency_s=10 ** rng.uniform(-2, 1.5),
        spread=rng.choice([0.0, 0.5, 1.0]),
        cap=rng.choice([None, None, 8]),
        faults=tuple(rng.sample(PASSING, 2)),
        fault_rate=rng.choice([0.0, 0.05, 0.2]),
        answer_tokens=rng.randint(max_tokens // 3, max_tokens),
        thinking_tokens=rng.choice([0, 0, 10]),
    )


async def spend(made: Scenario) -> tuple[Budget, str, float]:
    """Run until the money is gone. Returns the budget, the end and the most that was ever spent and reserved together."""
    budget = Budget(made.max_usd)
    most = 0.0

    async def store(outcome: Outcome) -> None:
        nonlocal most
        most = max(most, budget.spent_usd + budget.reserved_usd)

    end = await Scheduler(made.lanes, made.routes, budget).run(made.source, store)
    return budget, end.reason, most


@pytest.mark.parametrize("part", range(4))
def test_the_cap_is_never_passed_and_nearly_all_of_it_is_used(virtual: Callable[..., Any], part: int) -> None:
    for number in range(part, SCENARIOS, 4):
        made = scenario(number)
        budget, reason, most = virtual(spend, made)
        where = f"scenario {number}: {made.worst_calls:.1f} worst-case calls, ${budget.spent_usd:.6f} of ${made.max_usd:.6f}"
        rounding = 1e-9 * made.max_usd
        assert reason == "budget", where
        assert max(most, budget.spent_usd) <= made.max_usd + rounding, where
        assert sum(server.seen.billed_usd for server in made.servers) <= budget.spent_usd + rounding, where
        assert budget.outstanding == 0, where
        if made.worst_calls >= CALLS_OF_A_CAP:
            assert budget.spent_usd >= SHARE_TO_USE * made.max_usd, where
