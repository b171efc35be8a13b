"""The described server behaves as the servers whose facts it stands for."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from agents.prices import Price
from agents.simulated import Behaviour, Fault, SimulatedServer, Window
from agents.task import Sampling
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ProviderUnavailable, RateLimited

PROMPT = [Message(role="user", content="Explain in one or two sentences what LDA #$10 does.")]


class Crowd:
    """Requests sent at chosen times; keeps when each was answered, or how it was refused."""

    def __init__(self, server: SimulatedServer) -> None:
        self.server = server
        self.ended: list[float] = []
        self.refused: list[tuple[float, Exception]] = []

    async def one(self, at: float, model: str) -> None:
        await anyio.sleep_until(at)
        try:
            await self.server.generate(model, PROMPT, Sampling())
        except (ProviderUnavailable, RateLimited, AuthFailed, BadRequest) as error:
            self.refused.append((anyio.current_time(), error))
        else:
            self.ended.append(anyio.current_time())

    async def run(self, *sent: tuple[float, str]) -> "Crowd":
        async with anyio.create_task_group() as group:
            for at, model in sent:
                group.start_soon(self.one, at, model)
        return self


@pytest.fixture
def crowd(virtual: Callable[..., Any]) -> Callable[..., Crowd]:
    def go(behaviour: Behaviour, *sent: tuple[float, str], **options: Any) -> Crowd:
        crowd = Crowd(SimulatedServer(behaviour, **options))
        virtual(crowd.run, *sent)
        return crowd

    return go


def test_what_is_beyond_its_slots_waits_in_order(crowd: Callable[..., Crowd]) -> None:
    seen = crowd(Behaviour(latency_s=1.0, par=2), *[(0.0, "m")] * 5)
    assert seen.ended == pytest.approx([1, 1, 2, 2, 3])
    assert seen.server.seen.peak == 5


def test_two_models_in_turns_swap_and_grouped_they_do_not(crowd: Callable[..., Crowd]) -> None:
    turns = crowd(Behaviour(latency_s=1.0, par=2, swap_s=3.0), *[(0.0, "a"), (0.0, "b")] * 2)
    grouped = crowd(Behaviour(latency_s=1.0, par=2, swap_s=3.0), *[(0.0, "a")] * 2, *[(0.0, "b")] * 2)
    assert (turns.server.seen.swaps, turns.ended[-1]) == (4, pytest.approx(16.0))
    assert (grouped.server.seen.swaps, grouped.ended[-1]) == (2, pytest.approx(8.0))


def test_a_full_queue_is_503(crowd: Callable[..., Crowd]) -> None:
    seen = crowd(Behaviour(latency_s=1.0, par=1, queue=2), *[(0.0, "m")] * 5)
    assert len(seen.ended) == 3
    assert [error.billable for _, error in seen.refused if isinstance(error, ProviderUnavailable)] == [False, False]


def test_requests_a_minute_are_refused_with_the_wait(crowd: Callable[..., Crowd]) -> None:
    seen = crowd(Behaviour(latency_s=0.1, rpm=2), (0.0, "m"), (5.0, "m"), (10.0, "m"), (60.0, "m"), (64.0, "m"))
    assert len(seen.ended) == 3
    waits = [error.retry_after_s for _, error in seen.refused if isinstance(error, RateLimited)]
    assert waits == pytest.approx([50.0, 1.0])
    assert seen.server.seen.busiest_minute == 4


def test_a_minute_has_room_for_some_prompt_tokens(crowd: Callable[..., Crowd]) -> None:
    seen = crowd(Behaviour(latency_s=0.1, tpm=45), *[(0.0, "m")] * 3)
    assert (len(seen.ended), len(seen.refused)) == (2, 1)


def test_a_day_has_an_end(crowd: Callable[..., Crowd]) -> None:
    seen = crowd(Behaviour(latency_s=0.1, rpd=2), (0.0, "m"), (1.0, "m"), (2.0, "m"), (86400.5, "m"))
    assert len(seen.ended) == 3
    assert [error.per_day for _, error in seen.refused if isinstance(error, RateLimited)] == [True]


def test_too_many_at_once_is_429(crowd: Callable[..., Crowd]) -> None:
    seen = crowd(Behaviour(latency_s=1.0, cap=2), *[(0.0, "m")] * 3)
    assert (len(seen.ended), seen.server.seen.refused["429 at once"]) == (2, 1)


def test_an_outage_drops_what_runs_and_refuses_what_comes(crowd: Callable[..., Crowd]) -> None:
    price = {"m": Price(1e-6, 1e-6)}
    seen = crowd(
        Behaviour(latency_s=2.0, par=1, down=(Window(1.0, 5.0),)), (0.0, "m"), (0.5, "m"), (3.0, "m"), (5.0, "m"), prices=price
    )
    assert [(at, error.billable) for at, error in seen.refused if isinstance(error, ProviderUnavailable)] == [
        (1.0, True),  # it was being answered
        (1.0, False),  # it was still waiting
        (3.0, False),
    ]
    assert seen.ended == pytest.approx([7.0])
    assert seen.server.seen.billed_usd > 0


def test_the_load_of_others_slows_it(crowd: Callable[..., Crowd]) -> None:
    seen = crowd(Behaviour(latency_s=1.0, gpu=((Window(10.0, 20.0), 75.0),)), (0.0, "m"), (10.0, "m"), (20.0, "m"))
    assert seen.ended == pytest.approx([1.0, 14.0, 21.0])


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("dropped", ProviderUnavailable), ("503", ProviderUnavailable), ("429", RateLimited), ("429_wait", RateLimited)]
    + [("429_day", RateLimited), ("401", AuthFailed), ("400", BadRequest)],
)
def test_faults_raise_what_a_provider_raises(crowd: Callable[..., Crowd], fault: Fault, kind: type[Exception]) -> None:
    seen = crowd(Behaviour(faults=(fault,), fault_rate=1.0), (0.0, "m"))
    assert isinstance(seen.refused[0][1], kind)
    assert seen.server.in_flight == 0


@pytest.mark.parametrize(("fault", "reason"), [("cut", "length"), ("blocked", "blocked")])
def test_faults_that_are_answers(virtual: Callable[..., Any], fault: Fault, reason: str) -> None:
    server = SimulatedServer(Behaviour(faults=(fault,), fault_rate=1.0))
    completion = virtual(server.generate, "m", PROMPT, Sampling())
    assert completion.finish_reason == reason


def test_a_request_given_up_leaves_its_place_to_the_next(virtual: Callable[..., Any]) -> None:
    server = SimulatedServer(Behaviour(latency_s=1.0, par=1, swap_s=1.0, faults=(), fault_rate=0))

    async def work() -> float:
        with anyio.move_on_after(0.5):
            await server.generate("a", PROMPT, Sampling())  # given up while its model is loaded
        await server.generate("b", PROMPT, Sampling())
        return anyio.current_time()

    assert virtual(work) == pytest.approx(2.5)


def test_the_same_seed_is_the_same_run(crowd: Callable[..., Crowd]) -> None:
    behaviour = Behaviour(spread=0.5, faults=("503", "dropped"), fault_rate=0.3)
    sent = [(n / 10, "m") for n in range(50)]
    one, same, other = (crowd(behaviour, *sent, seed=seed) for seed in (1, 1, 2))
    assert one.ended == same.ended != other.ended
