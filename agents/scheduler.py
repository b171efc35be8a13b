"""Scheduler: from a source of tasks, over lanes, to outcomes.

- Every task that is handed out ends in exactly one outcome. Where the run ends first (drained, out of money, cancelled, an
  error is raised), tasks without an outcome are still owed: a later run is handed them again. Money they may have cost is
  not forgotten: a task that may have been billed ends in an outcome with an error, however the run ends. Only where storing
  an outcome has failed is no other one stored.
- Free lanes come before paid ones; a paid lane takes work when the free ones have no room.
- A retry gives its slot back and waits in the queue; the lane that failed it waits for it, other lanes may take it at once.
- At most twice as many tasks as there are slots are in hand, those included whose outcome is being stored.
- Nothing polls: the run sleeps until a call ends, or until the next moment at which time alone lets a call start.
"""

import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from agents.budget import Budget, Reservation
from agents.lanes import Lane, LaneState
from agents.task import Completion, Outcome, Task, Usage
from config.errors import (
    AuthFailed,
    BadRequest,
    BudgetExceeded,
    ConfigError,
    HafsError,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
)

ATTEMPTS = 6
_FIRST_BACKOFF_S = 0.5
_NEVER_ANSWERED_S = 10.0  # a run whose lanes have never answered is given up sooner: it is set up wrongly


class TaskSource(Protocol):
    def next(self) -> Task | None:
        """The next task; None: nothing now, because all that is missing is in flight or the target is met."""
        ...


@dataclass(frozen=True)
class RunEnd:
    """`message` says what a person should know about the end; empty where all went as planned."""

    reason: Literal["done", "drained", "budget"]
    message: str


@dataclass
class _Call:
    """A task in hand."""

    task: Task
    attempts: int = 0
    not_before: dict[str, float] = field(default_factory=dict)  # by lane
    lane: LaneState | None = None  # the last one
    error: str = ""
    cost_usd: float = 0.0
    cost_assumed: bool = False


@dataclass(frozen=True)
class _Run:
    source: TaskSource
    on_outcome: Callable[[Outcome], Awaitable[None]]
    group: TaskGroup


class Scheduler:
    """One run over some lanes.

    Args:
        routing: domain -> names of lanes that may serve it, in order of preference; a domain that is absent may use every lane.
        clock: seconds; must run at the pace of the event loop's clock.
        give_up_s: how long no lane may answer before the run is given up.

    Raises:
        ConfigError: names that do not fit together, or a paid lane whose price is unknown under a budget.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        routing: Mapping[str, Sequence[str]],
        budget: Budget,
        *,
        clock: Callable[[], float] = anyio.current_time,
        give_up_s: float = 60.0,
    ) -> None:
        _check(lanes, routing, budget)
        self._lanes = [LaneState(lane) for lane in lanes]
        self._routes = {domain: self._route(names) for domain, names in routing.items()}
        self._every_lane = self._route([lane.name for lane in lanes])
        self._budget = budget
        self._clock = clock
        self._give_up_s = give_up_s
        self._most_in_hand = 2 * sum(lane.slots for lane in lanes)
        self._in_hand = 0
        self._waiting: deque[_Call] = deque()
        self._stop: Literal["drained", "budget"] | None = None
        self._failure: Exception | None = None
        self._store_failed = False
        self._changed: anyio.Event | None = None

    async def run(self, source: TaskSource, on_outcome: Callable[[Outcome], Awaitable[None]]) -> RunEnd:
        """Work until the source has nothing left, `drain` is called, or the money is spent.

        `on_outcome` is awaited before its task leaves the hand, also when the run is cancelled meanwhile.

        Raises:
            ProviderUnavailable: no lane that may serve a task answers any more.
            AuthFailed, RateLimited: the lanes are closed for good, because of this.
            BadRequest: a lane has refused everything it was ever asked.
            Exception: what `source` or `on_outcome` raised, as it was.
        """
        run = _Run(source, on_outcome, anyio.create_task_group())
        try:
            async with run.group:
                await self._carry_failure(run, self._dispatch, run)
        finally:
            await self._give_back(run)
        if self._failure is not None:
            raise self._failure
        return RunEnd(self._stop or "done", self._message())

    def drain(self) -> None:
        """Start nothing new; what runs is finished and `run` returns."""
        self._stop = self._stop or "drained"
        self._wake()

    # --- handing out -------------------------------------------------------------------------------------------------

    async def _dispatch(self, run: _Run) -> None:
        while True:
            self._changed = anyio.Event()
            now = self._clock()
            if self._stop is None:
                self._admit(run, now)
                self._check_dead_ends(now)
            if self._stop is not None:
                await self._give_back(run)
            if self._in_hand == 0:
                return
            with anyio.move_on_after(self._next_moment(now) - now):
                await self._changed.wait()
            # An event that was set just before the run was cancelled hides this: nothing may be started any more.
            await anyio.lowlevel.checkpoint_if_cancelled()

    def _admit(self, run: _Run, now: float) -> None:
        """Start what can start: waiting calls first, then new tasks while a lane has room."""
        for _ in range(len(self._waiting)):
            call = self._waiting.popleft()
            if not self._place(call, run, now):
                self._waiting.append(call)  # a full round keeps the order
        # With nothing in hand a task is taken even without room: it shows whether there is anything left to wait for.
        while self._in_hand < self._most_in_hand and (self._in_hand == 0 or any(s.has_room(now) for s in self._lanes)):
            task = run.source.next()
            if task is None:
                return
            self._in_hand += 1
            call = _Call(task)
            if not self._place(call, run, now):
                self._waiting.append(call)

    def _place(self, call: _Call, run: _Run, now: float) -> bool:
        """Start a call on the first lane of its route that has room. False: none has."""
        for lane in self._routes.get(call.task.domain, self._every_lane):
            if not lane.has_room(now) or call.not_before.get(lane.lane.name, now) > now:
                continue
            held = None
            if lane.lane.paid:
                try:
                    held = self._budget.reserve(lane.lane.price, call.task.messages, call.task.sampling)
                except BudgetExceeded as error:
                    if self._budget.outstanding:
                        lane.out_of_money = True
                    else:
                        lane.close_for_good(error)
                    continue
            lane.started(now)
            run.group.start_soon(self._carry_failure, run, self._serve, run, call, lane, held)
            return True
        return False

    def _check_dead_ends(self, now: float) -> None:
        """A task that no lane will ever take ends the run: with "budget" if money is what is missing, else by raising."""
        for domain in {call.task.domain for call in self._waiting}:
            lanes = self._routes.get(domain, self._every_lane)
            usable = [lane for lane in lanes if lane.closed_by is None]
            if not usable:
                causes = [lane.closed_by for lane in lanes if lane.closed_by]
                if any(isinstance(cause, BudgetExceeded) for cause in causes):
                    self._stop = "budget"
                    return
                raise causes[-1]
            if all(lane.down for lane in usable) and now >= self._give_up_at(usable):
                last = usable[-1].last_error
                raise ProviderUnavailable(f"no lane answers: {last}", hint=last.hint if last else "") from last

    def _give_up_at(self, lanes: Sequence[LaneState]) -> float:
        since = max((lane.failing_since for lane in lanes if lane.failing_since is not None), default=math.inf)
        return since + (self._give_up_s if any(s.ok for s in self._lanes) else min(self._give_up_s, _NEVER_ANSWERED_S))

    def _next_moment(self, now: float) -> float:
        """When time alone next changes something: a lane opens, a wait is over, or the run is given up."""
        moments = [lane.ready_at() for lane in self._lanes]
        moments += [moment for call in self._waiting for moment in call.not_before.values()]
        moments += [self._give_up_at([lane]) for lane in self._lanes if lane.down]
        return min((moment for moment in moments if moment > now), default=math.inf)

    async def _give_back(self, run: _Run) -> None:
        """Let go of what waits."""
        while self._waiting:
            call = self._waiting.popleft()
            await self._let_go(run, call, f"{self._stop or 'cancelled'} before it was answered: {call.error}")

    async def _let_go(self, run: _Run, call: _Call, error: str) -> None:
        """End a call without an answer. Only what may have been billed becomes an outcome: the rest is simply owed."""
        if call.cost_usd:
            await self._end(run, _outcome(call, None, error))
        else:
            self._in_hand -= 1

    # --- one call ----------------------------------------------------------------------------------------------------

    async def _serve(self, run: _Run, call: _Call, lane: LaneState, held: Reservation | None) -> None:
        call.attempts += 1
        call.lane = lane
        try:
            result = await self._ask(call, lane, held)
        except BaseException as error:  # cancelled, as a rule: what was sent may be billed all the same
            await self._let_go(run, call, str(error) if isinstance(error, Exception) else "cancelled before it was answered")
            raise
        if isinstance(result, Completion):
            lane.answered()
            await self._end(run, _outcome(call, result))
            return
        call.error = str(result)
        if self._retry(call, lane, result):
            self._waiting.append(call)
            self._wake()
            return
        await self._end(run, _outcome(call, None, call.error))
        if lane.hopeless:
            raise BadRequest(f'lane "{lane.lane.name}" refuses every request: {result}', hint=result.hint) from result

    async def _ask(self, call: _Call, lane: LaneState, held: Reservation | None) -> Completion | ProviderError:
        """One request. The slot is free and the money settled when this returns, however it ends."""
        usage: Usage | None = None
        owed = True
        way = lane.lane
        try:
            with anyio.fail_after(way.timeout_s):
                completion = await way.provider.generate(way.model, call.task.messages, call.task.sampling)
            usage = completion.usage
            return completion
        except TimeoutError:
            return ProviderUnavailable(
                f'lane "{way.name}" gave no answer in {way.timeout_s:g} s', hint="raise the lane's timeout"
            )
        except ProviderError as error:
            owed = _may_be_billed(error)
            return error
        finally:
            lane.in_flight -= 1
            if held is not None:
                self._settle(call, held, usage, owed)
            self._wake()

    def _settle(self, call: _Call, held: Reservation, usage: Usage | None, owed: bool) -> None:
        if owed:
            cost = self._budget.settle(held, usage)
            call.cost_usd += cost.usd
            call.cost_assumed |= cost.assumed
        else:
            self._budget.release(held)
        for lane in self._lanes:
            lane.out_of_money = False

    def _retry(self, call: _Call, lane: LaneState, error: ProviderError) -> bool:
        """Tell the lane about the error. True: the call is worth another attempt."""
        now = self._clock()
        wait_s = _wait_s(error, call.attempts)
        match error:
            case RateLimited(per_day=True) | AuthFailed():
                lane.refused(error, bad_request=False)
                lane.close_for_good(error)
            case RateLimited():
                lane.rate_limited(error, now, wait_s)
            case ProviderUnavailable():
                lane.unavailable(error, now)
            case _:
                lane.refused(error, bad_request=isinstance(error, BadRequest))
                return False
        call.not_before[lane.lane.name] = now + wait_s
        return call.attempts < ATTEMPTS

    async def _end(self, run: _Run, outcome: Outcome) -> None:
        # Shielded: the answer is there and maybe paid for, so it is stored even when the run is being cancelled.
        with anyio.CancelScope(shield=True):
            if not self._store_failed:
                await self._store(run, outcome)
        self._in_hand -= 1
        self._wake()

    async def _store(self, run: _Run, outcome: Outcome) -> None:
        try:
            await run.on_outcome(outcome)
        except BaseException:
            self._store_failed = True
            raise

    # --- the rest ----------------------------------------------------------------------------------------------------

    async def _carry_failure(self, run: _Run, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a part of the run; its error stops the others and leaves `run` as itself, not inside an ExceptionGroup."""
        try:
            await work(*args)
        except Exception as error:
            self._failure = self._failure or error
            run.group.cancel_scope.cancel()

    def _route(self, names: Sequence[str]) -> list[LaneState]:
        by_name = {state.lane.name: state for state in self._lanes}
        return sorted((by_name[name] for name in names), key=lambda state: state.lane.paid)

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    def _message(self) -> str:
        closed = [f'lane "{state.lane.name}" was closed: {state.closed_by}' for state in self._lanes if state.closed_by]
        return "; ".join(closed)


def _check(lanes: Sequence[Lane], routing: Mapping[str, Sequence[str]], budget: Budget) -> None:
    names = [lane.name for lane in lanes]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"lanes need names of their own, and there must be one: {', '.join(names) or 'none'}")
    for domain, route in routing.items():
        if unknown := [name for name in route if name not in names]:
            raise ConfigError(f'routing.{domain} names the lane "{unknown[0]}"', hint=f"lanes are: {', '.join(names)}")
        if not route:
            raise ConfigError(f"routing.{domain} names no lane", hint="leave it out to allow every lane")
    for lane in lanes:
        if lane.paid and lane.price is None and budget.max_usd is not None:
            raise ConfigError(
                f'lanes.{lane.name}: the price of "{lane.model}" is not known, so max_usd cannot be kept',
                hint="use a model with a known price, or remove max_usd to run without a limit",
            )


def _outcome(call: _Call, completion: Completion | None, error: str = "") -> Outcome:
    lane = call.lane.lane if call.lane else None
    return Outcome(
        task=call.task,
        lane=lane.name if lane else "",
        provider=lane.provider.name if lane else "",
        attempt=call.attempts,
        completion=completion,
        error=error,
        cost_usd=call.cost_usd,
        cost_assumed=call.cost_assumed,
    )


def _may_be_billed(error: HafsError) -> bool:
    """What was refused costs nothing; what broke off, or was blocked on the way, may have been generated."""
    if isinstance(error, ProviderUnavailable):
        return error.billable
    return not isinstance(error, RateLimited | AuthFailed | BadRequest)


def _wait_s(error: ProviderError, attempt: int) -> float:
    """What the server asks for, else exponential backoff; with so little jitter that every wait is longer than the last."""
    if isinstance(error, RateLimited | ProviderUnavailable) and error.retry_after_s is not None:
        return error.retry_after_s + random.uniform(0, min(1.0, error.retry_after_s / 4))
    return _FIRST_BACKOFF_S * 2.0 ** (attempt - 1) * random.uniform(0.8, 1.2)
