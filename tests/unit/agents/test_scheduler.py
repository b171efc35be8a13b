import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import anyio
import pytest

from agents.budget import Budget
from agents.lanes import Endpoint, Lane, LaneEvent
from agents.policy import AT_ONCE, Policy
from agents.prices import Price
from agents.scheduler import RunEnd, Scheduler
from agents.task import Completion, Outcome, Sampling, Task, Usage
from config.contracts.sample import Message
from config.errors import (
    AuthFailed,
    BadRequest,
    Blocked,
    ConfigError,
    DiskFull,
    ModelMissing,
    ProviderUnavailable,
    RateLimited,
)
from tests.fakes.fake_provider import FakeProvider

PRICE = Price(1e-6, 1e-5)
ASM = {"asm": ["gpu"]}


def task(number: int, domain: str = "asm") -> Task:
    return Task(domain, "cell", f"s{number}", (Message(role="user", content=f"prompt {number}"),), Sampling(), 1, 0)


class Tasks:
    """`count` tasks, or those given."""

    def __init__(self, tasks: int | Iterable[Task]) -> None:
        self._left = [task(n) for n in range(tasks)] if isinstance(tasks, int) else list(tasks)
        self.handed_out = 0

    def next(self, domains: Collection[str]) -> Task | None:
        """The first that is of one of these domains."""
        found = next((one for one in self._left if one.domain in domains), None)
        if found:
            self._left.remove(found)
            self.handed_out += 1
        return found

    def remaining(self) -> int:
        return len(self._left)


class Run:
    """Runs a scheduler in virtual time and keeps what came of it."""

    def __init__(self, virtual: Any) -> None:
        self._virtual = virtual
        self.outcomes: list[Outcome] = []
        self.events: list[LaneEvent] = []
        self.seconds = 0.0
        self.scheduler: Scheduler

    def __call__(
        self,
        lanes: Sequence[Lane],
        source: Any,
        *,
        routing: Any = None,
        budget: Budget | None = None,
        policy: Policy = AT_ONCE,
        drain_after: int = 0,
    ) -> RunEnd:
        """`routing` None: every lane serves every domain."""
        every = [lane.name for lane in lanes]

        async def work() -> RunEnd:
            routes = routing or {"asm": every, "c": every}
            self.scheduler = Scheduler(lanes, routes, budget or Budget(None), policy, on_event=self.events.append)
            try:
                return await self.scheduler.run(source, keep)
            finally:
                self.seconds = anyio.current_time()

        async def keep(outcome: Outcome) -> None:
            self.outcomes.append(outcome)
            if len(self.outcomes) == drain_after:
                self.scheduler.drain()

        return self._virtual(work)


@pytest.fixture
def run(virtual: Any) -> Run:
    return Run(virtual)


def lane(
    script: Iterable[Any], name: str = "gpu", slots: int = 4, latency_s: float = 1.0, rpm: int | None = None, **more: Any
) -> Lane:
    endpoint = Endpoint(name, slots=slots, rpm=rpm)
    return Lane(name, FakeProvider(script, latency_s=latency_s), "m", endpoint, own="price" not in more, **more)


def forever(entry: Any) -> Iterable[Any]:
    return itertools.repeat(entry)


def test_fills_its_slots_and_ends_when_the_source_is_dry(run: Run) -> None:
    gpu = lane(forever("ok"), slots=4)
    end = run([gpu], Tasks(12))
    assert end == RunEnd("done", "")
    assert len({outcome.task.id for outcome in run.outcomes}) == len(run.outcomes) == 12
    assert gpu.provider.peak == 4
    assert run.seconds == pytest.approx(3.0)
    first = run.outcomes[0]
    assert (first.lane, first.provider, first.attempt, first.error, first.cost_usd) == ("gpu", "ollama", 1, "", 0.0)


def test_a_source_may_give_more_after_an_outcome(run: Run) -> None:
    class OneAtATime:
        left = 3

        def next(self, domains: Collection[str]) -> Task | None:
            if not self.remaining():
                return None
            self.left -= 1
            return task(self.left)

        def remaining(self) -> int:
            return self.left if len(run.outcomes) + self.left == 3 else 0

    assert run([lane(forever("ok"))], OneAtATime()).reason == "done"
    assert len(run.outcomes) == 3 and run.seconds == pytest.approx(3.0)


def test_nothing_to_do_ends_at_once(run: Run) -> None:
    assert run([lane([])], Tasks(0)) == RunEnd("done", "")


def test_a_slow_outcome_slows_admission(virtual: Any) -> None:
    source = Tasks(100)

    async def work() -> None:
        async def stuck(outcome: Outcome) -> None:
            await anyio.sleep(1000)

        with anyio.move_on_after(500) as scope:
            with anyio.CancelScope() as inner:
                async with anyio.create_task_group() as group:
                    group.start_soon(Scheduler([lane(forever("ok"), slots=4)], ASM, Budget(None)).run, source, stuck)
                    await anyio.sleep(400)
                    assert source.handed_out == 8  # twice the slots
                    inner.cancel()
        assert not scope.cancelled_caught or anyio.current_time() >= 1000  # what was being stored was stored

    virtual(work)


def test_free_lanes_first_paid_ones_when_they_are_busy(run: Run) -> None:
    price = Price(1e-6, 1e-6)
    paid = lane(forever("ok"), "flash", slots=2, price=price)
    free = lane(forever("ok"), "gpu", slots=2)
    run([paid, free], Tasks(2))
    assert {outcome.lane for outcome in run.outcomes} == {"gpu"}
    run([paid, lane(forever("ok"), "gpu", slots=2)], Tasks(4))
    assert sorted(outcome.lane for outcome in run.outcomes[2:]) == ["flash", "flash", "gpu", "gpu"]


def test_routing(run: Run) -> None:
    lanes = [lane(forever("ok"), "a"), lane(forever("ok"), "b")]
    run(
        lanes,
        Tasks([task(n, domain) for n, domain in enumerate(["asm", "rom", "asm", "rom"])]),
        routing={"asm": ["b"], "rom": ["a", "b"]},
    )
    assert {(outcome.task.domain, outcome.lane) for outcome in run.outcomes} == {("asm", "b"), ("rom", "a")}


def test_rate_limited_waits_as_long_as_asked(run: Run) -> None:
    run([lane([RateLimited("slow down", retry_after_s=34), "ok"], slots=1, latency_s=0)], Tasks(1))
    assert run.outcomes[0].attempt == 1 and run.outcomes[0].completion  # a 429 is not the task's fault
    assert 34 <= run.seconds <= 35


def test_another_lane_takes_a_rate_limited_task_at_once(run: Run) -> None:
    lanes = [lane([RateLimited("no", retry_after_s=60)], "a", slots=1), lane(forever("ok"), "b", slots=1)]
    run(lanes, Tasks(1))
    assert run.outcomes[0].lane == "b" and run.seconds == pytest.approx(2.0)


def test_a_server_with_fewer_slots_is_found_out_and_loses_nothing(run: Run) -> None:
    class Crowded(FakeProvider):
        async def generate(self, *args: Any) -> Completion:
            if self._in_flight >= 32:
                self.refused += 1
                raise RateLimited("full", retry_after_s=1)
            return await super().generate(*args)

        refused = 0

    server = Crowded(forever("ok"), latency_s=0.2)
    run([Lane("gpu", server, "m", Endpoint("gpu", queues=False))], Tasks(2000))
    assert all(outcome.completion for outcome in run.outcomes) and len(run.outcomes) == 2000
    assert run.seconds < 1.25 * 2000 / 32 * 0.2
    assert server.refused < 400


def test_unavailable_is_retried_with_growing_waits_then_given_back_as_an_error(run: Run) -> None:
    class FailsOneTask(FakeProvider):
        times: list[float] = []

        async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
            if messages[0].content == "prompt 0":
                self.times.append(anyio.current_time())
                raise ProviderUnavailable("this one always breaks")
            return await super().generate(model, messages, sampling)

    provider = FailsOneTask(forever("ok"), latency_s=0.25)
    run([Lane("gpu", provider, "m", Endpoint("gpu", slots=4))], Tasks(200))
    failed = [outcome for outcome in run.outcomes if outcome.error]
    assert [(outcome.attempt, outcome.error, outcome.completion) for outcome in failed] == [(6, "this one always breaks", None)]
    gaps = [after - before for before, after in itertools.pairwise(provider.times)]
    assert all(later > earlier for earlier, later in itertools.pairwise(gaps))


def test_a_task_that_hangs_is_timed_out(run: Run) -> None:
    run([lane(["late", "ok"], slots=1, latency_s=130)], Tasks(0))
    with pytest.raises(ProviderUnavailable, match="no answer in 120 s"):
        run([lane(forever("late"), slots=8, latency_s=130)], Tasks(8))


def test_a_dead_lane_is_given_up_after_ten_seconds_and_is_not_hammered(run: Run) -> None:
    dead = lane(forever(ProviderUnavailable("cannot connect to box:1", hint="start it")), slots=8, latency_s=0)
    with pytest.raises(ProviderUnavailable, match="no lane answers: cannot connect to box:1") as raised:
        run([dead], Tasks(100))
    assert raised.value.hint == "start it"
    assert 10 <= run.seconds < 11
    assert dead.provider.calls <= 8 + 5


def test_a_lane_that_has_answered_is_waited_for(run: Run) -> None:
    dead = lane(itertools.chain(["ok"] * 4, forever(ProviderUnavailable("gone"))), latency_s=0.1)
    with pytest.raises(ProviderUnavailable, match="gone"):
        run([dead], Tasks(1000), policy=Policy(give_up_s=600))
    assert 600 <= run.seconds < 605


def test_a_lane_that_comes_back_goes_on(run: Run) -> None:
    blip = itertools.chain(["ok"] * 4, [ProviderUnavailable("restarting")] * 12, forever("ok"))
    assert run([lane(blip, latency_s=0.1)], Tasks(50)).reason == "done"
    assert sum(outcome.completion is not None for outcome in run.outcomes) == 50


def test_one_dead_lane_does_not_stop_the_other(run: Run) -> None:
    dead = lane(forever(ProviderUnavailable("gone")), "dead", latency_s=0)
    assert run([dead, lane(forever("ok"), "alive")], Tasks(400)).reason == "done"
    assert all(outcome.lane == "alive" and outcome.completion for outcome in run.outcomes)
    assert dead.provider.calls <= 4 + 5 + run.seconds / 4  # a machine of one's own is tried every four seconds


def test_a_refused_key_closes_its_lane_and_raises_where_none_is_left(run: Run) -> None:
    refused = AuthFailed("key refused", hint="get one")
    end = run([lane(forever(refused), "a", latency_s=0), lane(forever("ok"), "b")], Tasks(20))
    assert end.reason == "done" and 'lane "a" was closed: key refused' in end.message
    assert {outcome.lane for outcome in run.outcomes} == {"b"}
    with pytest.raises(AuthFailed, match="key refused"):
        run([lane(forever(refused))], Tasks(20))


def test_an_exhausted_day_closes_the_lane_until_it_is_over(run: Run) -> None:
    spent = RateLimited("quota of the day", retry_after_s=3, per_day=True)
    flash = lane(["ok", spent, "ok"], "flash", slots=1, latency_s=0.1)
    assert run([flash, lane(forever("ok"), "gpu", slots=1)], Tasks(20)).reason == "done"
    assert flash.provider.calls == 2
    alone = lane([spent, "ok"], "flash", slots=1, latency_s=0.1)
    assert run([alone], Tasks(1)).reason == "done"
    assert alone.provider.calls == 2 and run.seconds > 60


def test_what_no_retry_mends_is_not_retried(run: Run) -> None:
    entries = ["ok", BadRequest("too long"), Blocked("safety"), "ok"]
    run([lane(entries, slots=1)], Tasks(4))
    assert [(outcome.error, outcome.attempt) for outcome in run.outcomes] == [("", 1), ("too long", 1), ("safety", 1), ("", 1)]


def test_a_lane_that_refuses_everything_stops_the_run(run: Run) -> None:
    wrong = BadRequest("no such option", hint="upgrade")
    with pytest.raises(BadRequest, match="no such option") as raised:
        run([lane(forever(wrong), slots=1)], Tasks(50))
    assert raised.value.hint == "upgrade"
    assert len(run.outcomes) == 5
    many = lane(itertools.chain(["ok"], [wrong] * 20), slots=1)
    assert run([many], Tasks(21)).reason == "done"


def test_a_missing_model_closes_its_lane_and_costs_no_task_an_attempt(run: Run) -> None:
    missing = ModelMissing("model 'x' not found", hint="ollama pull x")
    end = run([lane(forever(missing), "a", latency_s=0), lane(forever("ok"), "b")], Tasks(8))
    assert end.reason == "done" and "model 'x' not found" in end.message
    assert all(outcome.completion and outcome.attempt == 1 for outcome in run.outcomes)
    with pytest.raises(ModelMissing):
        run([lane(forever(missing))], Tasks(8))


def test_drain_finishes_what_runs_and_starts_nothing_new(run: Run) -> None:
    gpu = lane(forever("ok"), slots=4)
    end = run([gpu], Tasks(100), drain_after=2)
    assert end.reason == "drained"
    assert len(run.outcomes) == gpu.provider.calls == 4
    assert all(outcome.completion for outcome in run.outcomes)


def test_drain_does_not_wait_for_retries_and_leaves_them_owed(run: Run) -> None:
    gpu = lane(["ok", RateLimited("later", retry_after_s=500), "ok"], slots=3)
    assert run([gpu], Tasks(3), drain_after=2).reason == "drained"
    assert len(run.outcomes) == 2 and run.seconds < 2


def test_the_limit_of_requests_a_minute(run: Run) -> None:
    class Timed(FakeProvider):
        times: list[float] = []

        async def generate(self, *args: Any) -> Completion:
            self.times.append(anyio.current_time())
            return await super().generate(*args)

    provider = Timed(forever("ok"), latency_s=0.5)
    run([Lane("flash", provider, "m", Endpoint("flash", slots=8, rpm=10))], Tasks(35))
    assert len(run.outcomes) == 35
    assert all(later - earlier > 60 for earlier, later in zip(provider.times, provider.times[10:], strict=False))
    assert run.seconds < 190


def paid_completion() -> Completion:
    return Completion("yes", "stop", Usage(prompt_tokens=2, completion_tokens=1, thinking_tokens=1), "m", 0.1)


def test_the_budget_ends_the_run_and_says_so(run: Run) -> None:
    budget = Budget(0.01)
    flash = lane(forever(paid_completion()), "flash", slots=64, price=Price(1e-5, 1e-4))
    end = run([flash], Tasks(10_000), budget=budget)
    assert end.reason == "budget" and "the budget of $0.01 is met" in end.message
    assert sum(outcome.cost_usd for outcome in run.outcomes) == pytest.approx(budget.spent_usd)
    # Spent to the last call whose worst case fits.
    assert 0 <= 0.01 - budget.spent_usd < 96 * 1e-4 + 60 * 1e-5
    assert budget.outstanding == 0


def test_free_lanes_go_on_when_the_money_is_spent(run: Run) -> None:
    flash = lane(forever(paid_completion()), "flash", price=Price(1e-5, 1e-4))
    end = run([flash, lane(forever("ok"), "gpu")], Tasks(200), budget=Budget(0.015))
    assert end.reason == "done" and "is met" in end.message
    assert len(run.outcomes) == 200 and all(outcome.completion for outcome in run.outcomes)


@pytest.mark.parametrize(
    ("error", "assumed"),
    [
        (ProviderUnavailable("dropped in mid-answer"), True),
        (Blocked("safety"), True),
        (ProviderUnavailable("503", billable=False), False),
        (RateLimited("429", retry_after_s=1), False),
        (BadRequest("400"), False),
    ],
)
def test_a_paid_call_without_usage_is_assumed_only_where_it_may_be_billed(run: Run, error: Any, assumed: bool) -> None:
    budget = Budget(1.0)
    price = Price(1e-6, 1e-5)
    run([lane([error, paid_completion()], slots=1, price=price)], Tasks(1), budget=budget)
    outcome = run.outcomes[0]
    answered = price.cost(paid_completion().usage) if outcome.completion else 0.0
    assert outcome.cost_assumed is assumed
    assert outcome.cost_usd == pytest.approx(budget.spent_usd)
    assert (outcome.cost_usd - answered > 96 * 1e-5) is assumed


def test_money_that_a_drained_task_may_have_cost_is_not_forgotten(run: Run) -> None:
    budget = Budget(1.0)
    script = [paid_completion(), ProviderUnavailable("dropped")]
    run([lane(script, slots=2, price=Price(1e-6, 1e-5))], Tasks(2), budget=budget, drain_after=1)
    assert sorted(outcome.error for outcome in run.outcomes) == ["", "drained before it was answered: dropped"]
    assert sum(outcome.cost_usd for outcome in run.outcomes) == pytest.approx(budget.spent_usd)


def test_an_unknown_price_under_a_budget_is_refused_before_anything_is_sent() -> None:
    nobody_knows = Lane("flash", FakeProvider([], name="gemini"), "gemini-99", Endpoint("gemini"), own=False)
    with pytest.raises(ConfigError, match='lanes.flash: the price of "gemini-99" is not known') as raised:
        Scheduler([nobody_knows], {"asm": ["flash"]}, Budget(5.0))
    assert "remove max_usd" in raised.value.hint
    Scheduler([nobody_knows], {"asm": ["flash"]}, Budget(None))


@pytest.mark.parametrize("routing", [{"asm": ["nope"]}, {"asm": []}])
def test_routing_that_fits_no_lane_is_refused(routing: Any) -> None:
    with pytest.raises(ConfigError, match="routing.asm"):
        Scheduler([lane([])], routing, Budget(None))


def test_an_error_of_the_store_leaves_the_run_as_itself(virtual: Any) -> None:
    async def work() -> None:
        async def full(outcome: Outcome) -> None:
            raise DiskFull("no space left for samples.jsonl")

        with pytest.raises(DiskFull):
            await Scheduler([lane(forever("ok"))], ASM, Budget(None)).run(Tasks(20), full)

    virtual(work)


def test_an_error_of_the_store_is_the_last_it_is_asked(virtual: Any) -> None:
    calls = 0

    async def work() -> None:
        async def full(outcome: Outcome) -> None:
            nonlocal calls
            calls += 1
            raise DiskFull("no space left for samples.jsonl")

        # The second is the first to be stored, and fails; the first waits for its retry, the others are answered just then.
        script = [ProviderUnavailable("dropped"), Blocked("safety"), "late", "late"]
        flash = lane(script, "gpu", slots=4, latency_s=0.1, price=PRICE)
        with pytest.raises(DiskFull):
            await Scheduler([flash], ASM, Budget(None)).run(Tasks(4), full)

    virtual(work)
    assert calls == 1


def test_cancelling_stores_what_was_answered_and_what_may_be_billed(virtual: Any) -> None:
    stored: list[Outcome] = []
    budget = Budget(1.0)

    async def work() -> None:
        async def slow(outcome: Outcome) -> None:
            await anyio.sleep(5)
            stored.append(outcome)

        lanes = [
            lane(forever(paid_completion()), "flash", slots=2, latency_s=10, price=PRICE),
            lane(forever("late"), "gpu", slots=2, latency_s=100),
        ]
        with anyio.move_on_after(12) as scope:  # two paid calls are being stored; two more and two free ones are running
            await Scheduler(lanes, {"asm": ["flash", "gpu"]}, budget).run(Tasks(50), slow)
        assert scope.cancelled_caught
        assert anyio.current_time() == pytest.approx(17)

    virtual(work)
    answered, cut_off = stored[:2], stored[2:]
    assert [outcome.cost_assumed for outcome in answered] == [False, False]
    assert [(outcome.lane, outcome.error) for outcome in cut_off] == [("flash", "cancelled before it was answered")] * 2
    assert all(outcome.cost_assumed and outcome.cost_usd > 96 * 1e-5 for outcome in cut_off)
    assert len({outcome.task.id for outcome in stored}) == 4
    assert budget.outstanding == 0
    assert budget.spent_usd == pytest.approx(sum(outcome.cost_usd for outcome in stored))


@pytest.mark.parametrize("end", ["cancelled", "source"])
def test_a_retry_that_waits_when_the_run_breaks_off_keeps_its_cost(virtual: Any, end: str) -> None:
    outcomes: list[Outcome] = []
    budget = Budget(1.0)

    class Breaks(Tasks):
        def remaining(self) -> int:
            if end == "source" and self.handed_out == 2 and anyio.current_time() > 0:
                raise OSError("the source is gone")
            return super().remaining()

    async def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)

    async def work() -> None:
        # One waits for its retry, perhaps billed; a free one is in flight.
        flash = lane([ProviderUnavailable("dropped", retry_after_s=500)], "flash", slots=2, price=PRICE)
        gpu = lane(forever("late"), "gpu", slots=1, latency_s=5)
        run = Scheduler([flash, gpu], {"rom": ["gpu"], "asm": ["flash"]}, budget).run
        with anyio.move_on_after(3):
            await run(Breaks([task(0), task(1, "rom")]), keep)

    if end == "source":
        with pytest.raises(OSError, match="the source is gone"):
            virtual(work)
    else:
        virtual(work)
    assert [(outcome.task.id, outcome.error) for outcome in outcomes] == [
        (task(0).id, "cancelled before it was answered: dropped")
    ]
    assert outcomes[0].cost_assumed and outcomes[0].cost_usd == pytest.approx(budget.spent_usd) and budget.spent_usd > 0


def test_nothing_is_started_once_the_run_is_cancelled(virtual: Any) -> None:
    flash = lane(forever(paid_completion()), "flash", slots=1, price=PRICE)

    async def work() -> None:
        with anyio.CancelScope() as scope:

            async def cancel(outcome: Outcome) -> None:
                scope.cancel()

            await Scheduler([flash], {"asm": ["flash"]}, Budget(None)).run(Tasks(5), cancel)

    virtual(work)
    assert flash.provider.calls == 1
