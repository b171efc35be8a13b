"""What could make a run stand still beside work that could be done, or forget money: each was seen once."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from agents.attempts import wait_of
from agents.budget import Budget
from agents.lanes import Endpoint, Lane, LaneEvent
from agents.policy import AT_ONCE, Policy
from agents.prices import Price
from agents.scheduler import RunEnd, Scheduler
from agents.simulated import Behaviour, SimulatedServer, Window
from agents.task import Completion, Outcome, Sampling, Task
from config.contracts.sample import Message
from config.errors import BadRequest, ModelMissing, RateLimited, StoreError

PRICE = Price(1e-6, 1e-5)


class Tasks:
    def __init__(self, **count_by_domain: int) -> None:
        self._left = [(domain, n) for domain, count in count_by_domain.items() for n in range(count)]

    def next(self, domains: Collection[str]) -> Task | None:
        found = next((each for each in self._left if each[0] in domains), None)
        if found is None:
            return None
        self._left.remove(found)
        return Task(found[0], "cell", f"s{found[1]}", (Message(role="user", content=f"prompt {found}"),), Sampling(), 1, 0)

    def remaining(self) -> int:
        return len(self._left)


class Run:
    """One run in virtual time: `seconds` until it ended, its outcomes and events."""

    def __init__(
        self,
        virtual: Any,
        lanes: Sequence[Lane],
        tasks: Tasks,
        *,
        routes: Mapping[str, Sequence[str]] | None = None,
        policy: Policy = AT_ONCE,
        budget: Budget | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.events: list[LaneEvent] = []
        self.budget = budget or Budget(None)
        every = routes or {"asm": [lane.name for lane in lanes]}
        self.scheduler = Scheduler(lanes, every, self.budget, policy, on_event=self.events.append)
        self.seconds, self.end = virtual(self._work, tasks)

    async def _work(self, tasks: Tasks) -> tuple[float, RunEnd]:
        end = await self.scheduler.run(tasks, self._keep)
        return anyio.current_time(), end

    async def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def lane(name: str, server: SimulatedServer, endpoint: Endpoint, **more: Any) -> Lane:
    return Lane(name, server, name, endpoint, own="price" not in more, **more)


def simple(name: str, latency_s: float, slots: int, **more: Any) -> Lane:
    """A lane with a server of its own, whose pace is known from the start."""
    endpoint = Endpoint(name, queues="price" not in more, slots=slots)
    return lane(name, SimulatedServer(Behaviour(latency_s=latency_s)), endpoint, typical_s=latency_s, **more)


def test_a_free_lane_does_not_wait_for_a_paid_one_that_is_saved_for_later(virtual: Any) -> None:
    lanes = [simple("gpu", 10.0, 2), simple("flash", 1.0, 8, price=PRICE)]
    run = Run(virtual, lanes, Tasks(asm=20), policy=Policy(deadline_s=4 * 3600.0, paid="when_late"))
    assert run.seconds == pytest.approx(100.0)
    assert {outcome.lane for outcome in run.outcomes} == {"gpu"}


def test_a_model_whose_turn_it_is_does_not_wait_for_a_faster_one_of_the_same_server(virtual: Any) -> None:
    models = {"slow": Behaviour(latency_s=10.0), "fast": Behaviour(latency_s=1.0)}
    server = SimulatedServer(Behaviour(par=4, swap_s=2.0), by_model=models)
    endpoint = Endpoint("box", swaps=True, slots=4)
    lanes = [lane(name, server, endpoint, typical_s=behaviour.latency_s) for name, behaviour in models.items()]
    run = Run(virtual, lanes, Tasks(asm=5))
    assert len(run.outcomes) == 5 and run.seconds < 30


def test_a_turn_of_a_model_that_nothing_is_routed_to_is_no_turn(virtual: Any) -> None:
    server = SimulatedServer(Behaviour(latency_s=1.0, par=4, swap_s=2.0, faults=("429_wait",), fault_rate=0.3))
    endpoint = Endpoint("box", swaps=True, slots=4)
    lanes = [lane(name, server, endpoint) for name in ("idle", "other", "works")]
    run = Run(virtual, lanes, Tasks(asm=40), routes={"asm": ["works"]})
    assert len(run.outcomes) == 40 and run.seconds < 150


def test_a_lane_that_left_a_task_to_a_faster_one_takes_it_when_there_is_no_money_for_that(virtual: Any) -> None:
    lanes = [simple("gpu", 10.0, 1), simple("flash", 1.0, 8, price=PRICE)]
    run = Run(virtual, lanes, Tasks(asm=3), budget=Budget(1e-9))
    assert run.seconds == pytest.approx(30.0)
    assert {outcome.lane for outcome in run.outcomes} == {"gpu"}


def test_tasks_that_wait_for_a_retry_leave_no_slot_idle(virtual: Any) -> None:
    class Crowded(SimulatedServer):
        async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
            await anyio.sleep(0.003)
            try:
                return await super().generate(model, messages, sampling)
            except RateLimited as error:
                raise RateLimited(str(error), retry_after_s=1.0) from error

    server = Crowded(Behaviour(latency_s=0.2, cap=32))
    flash = Lane("flash", server, "m", Endpoint("flash", queues=False, slots=128))
    run = Run(virtual, [flash, simple("gpu", 1.0, 4)], Tasks(asm=2000, rom=40), routes={"asm": ["flash"], "rom": ["gpu"]})
    assert run.seconds <= 1.05 * 2000 / 32 * 0.203
    assert [event.text for event in run.events if event.kind == "limit"] == ["flash bears 32 calls at once"]
    gpu = run.scheduler.views()[1]
    assert "storing" not in gpu.idle_s


class Reboots(SimulatedServer):
    """Away for seven seconds; it comes back without the model `gone`."""

    def __init__(self) -> None:
        super().__init__(Behaviour(latency_s=0.2, down=(Window(1.0, 8.0),)))

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        if model == "gone" and anyio.current_time() > 5:
            raise ModelMissing("model 'gone' not found")
        return await super().generate(model, messages, sampling)


def test_a_server_that_came_back_without_one_model_serves_the_others(virtual: Any) -> None:
    server, endpoint = Reboots(), Endpoint("box", slots=4)
    run = Run(virtual, [lane("gone", server, endpoint), lane("there", server, endpoint)], Tasks(asm=300))
    assert len(run.outcomes) == 300 and run.seconds < 30
    assert {event.kind for event in run.events} >= {"down", "closed", "back"}


def test_a_server_that_lists_no_models_is_tried_again_all_the_same(virtual: Any) -> None:
    class ListsNone(SimulatedServer):
        async def models(self) -> list[str]:
            raise BadRequest("404 page not found")

    server = ListsNone(Behaviour(latency_s=0.2, down=(Window(1.0, 8.0),)))
    run = Run(virtual, [lane("gpu", server, Endpoint("box", slots=4))], Tasks(asm=300))
    assert len(run.outcomes) == 300 and run.seconds < 40


def test_a_second_call_that_loses_its_race_leaves_the_way_to_its_server_open(virtual: Any) -> None:
    """It was the one call that is let through to a server that was down."""

    class Box(SimulatedServer):
        async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
            if 1 < anyio.current_time() < 30:
                await anyio.sleep(100)
            return await super().generate(model, messages, sampling)

    class Later(Tasks):
        def next(self, domains: Collection[str]) -> Task | None:
            return super().next(domains) if anyio.current_time() >= 30 or self.remaining() > 20 else None

    box = Box(Behaviour(latency_s=0.2, down=(Window(0.0, 0.5),)))
    cloud = SimulatedServer(Behaviour(latency_s=30.0))
    lanes = [lane("box", box, Endpoint("box", slots=5)), lane("cloud", cloud, Endpoint("cloud", slots=8), typical_s=1.0)]
    run = Run(virtual, lanes, Later(asm=25))
    assert len(run.outcomes) == 25 and run.scheduler.views()[0].ok > 0
    assert run.seconds < 65


def test_the_end_does_not_wait_for_a_server_that_is_down(virtual: Any) -> None:
    class Mute(SimulatedServer):
        async def models(self) -> list[str]:
            await anyio.sleep_forever()
            raise AssertionError

    mute = Mute(Behaviour(latency_s=0.1, down=(Window(0.0, math.inf),)))
    run = Run(virtual, [lane("mute", mute, Endpoint("box", slots=5)), simple("gpu", 1.0, 4)], Tasks(asm=9))
    assert len(run.outcomes) == 9 and run.seconds == pytest.approx(3.0)


def test_an_answer_that_is_kept_for_later_is_paid_for_when_it_comes(virtual: Any) -> None:
    server = SimulatedServer(Behaviour(latency_s=60.0), prices={"batch": PRICE})
    batch = lane("batch", server, Endpoint("batch", queues=False, slots=8), price=PRICE, keeps=True)
    run = Run(virtual, [batch], Tasks(asm=8), budget=Budget(1.0))
    assert run.budget.spent_usd == pytest.approx(sum(outcome.cost_usd for outcome in run.outcomes))
    assert run.budget.spent_usd == pytest.approx(server.seen.billed_usd) and run.budget.spent_usd > 0


def test_a_task_may_be_refused_ever_so_often() -> None:
    assert 48 <= wait_of(RateLimited("429"), 8) <= 72
    assert 48 <= wait_of(RateLimited("429"), 2000) <= 72


def test_an_error_beside_the_run_leaves_it_as_itself(virtual: Any, tmp_path: Path) -> None:
    (tmp_path / "users").write_text("no folder")
    endpoint = Endpoint("box", slots=4, shared=tmp_path)
    with pytest.raises(StoreError):
        Run(virtual, [lane("gpu", SimulatedServer(Behaviour()), endpoint)], Tasks(asm=4))
