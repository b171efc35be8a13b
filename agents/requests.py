"""One request to one lane. However it ends, its slot is free, its money settled and its lane told when `ask` returns."""

from collections.abc import Callable, Sequence

import anyio

from agents.attempts import Call, may_be_billed
from agents.budget import Budget, Reservation
from agents.endpoints import LaneState
from agents.lanes import LaneEvent
from agents.task import Completion, Usage
from config.errors import ProviderError, ProviderUnavailable


class Requests:
    """Args:
    wake: called whenever a slot or money has come free.
    """

    def __init__(
        self,
        lanes: Sequence[LaneState],
        budget: Budget,
        clock: Callable[[], float],
        wake: Callable[[], None],
        on_event: Callable[[LaneEvent], None],
    ) -> None:
        self._lanes = lanes
        self._budget = budget
        self._clock = clock
        self._wake = wake
        self._on_event = on_event

    async def ask(self, call: Call, lane: LaneState, held: Reservation | None, expected: int) -> Completion | ProviderError:
        """One request. The slot is free and the money settled when this returns, however it ends."""
        usage: Usage | None = None
        owed = not lane.lane.keeps
        way, endpoint, started = lane.lane, lane.endpoint, self._clock()
        try:
            with anyio.fail_after(way.timeout_s):
                completion = await way.provider.generate(way.model, call.task.messages, call.task.sampling)
            usage, owed = completion.usage, True
            self._note_answer(lane, started, usage)
            return completion
        except TimeoutError:
            return ProviderUnavailable(
                f'lane "{way.name}" gave no answer in {way.timeout_s:g} s', hint="raise the lane's timeout"
            )
        except ProviderError as error:
            owed = may_be_billed(error)
            return error
        finally:
            lane.in_flight -= 1
            endpoint.in_flight -= 1
            call.leave(lane)
            if endpoint.spec.tpm and usage:
                spent = usage.prompt_tokens + usage.completion_tokens + usage.thinking_tokens
                endpoint.rates.correct(self._clock(), expected, spent)
            if held is not None:
                self._settle(call, lane, held, usage, owed)
            self._wake()

    def _note_answer(self, lane: LaneState, started: float, usage: Usage) -> None:
        now, was_down = self._clock(), lane.endpoint.breaker.down
        if lane.endpoint.turns:
            lane.endpoint.turns.answered(now, lane.latency_s or 0.0)
        lane.endpoint.answered(now, started, usage, lane.lane.model)
        lane.answered(now - started, usage)
        if was_down:
            self._on_event(LaneEvent(lane.name, "back", f"{lane.endpoint.spec.key} answers again"))

    def _settle(self, call: Call, lane: LaneState, held: Reservation, usage: Usage | None, owed: bool) -> None:
        if owed:
            cost = self._budget.settle(held, usage)
            call.cost_usd += cost.usd
            call.cost_assumed |= cost.assumed
            lane.cost_usd += cost.usd
        else:
            self._budget.release(held)
        for other in self._lanes:
            other.out_of_money = False
