"""Scheduler: from a source of tasks, over lanes, to outcomes.

- Every task that is handed out ends in exactly one outcome. Where the run ends first (drained, out of money, cancelled, an
  error is raised), tasks without an outcome are still owed: a later run is handed them again. Money they may have cost is
  not forgotten: a task that may have been billed ends in an outcome with an error, however the run ends. Only where storing
  an outcome has failed is no other one stored.
- A task is taken from the source only when a lane may start it at once. Free lanes come before paid ones; a paid lane takes
  work when the free ones have no room. A slot that stays idle beside work has a recorded reason (agents/lanes.py, Idle).
- A retry gives its slot back and waits in the queue; the lane that failed it waits for it, other lanes may take it at once.
- In the tail a second call may race a straggler; the first answer wins and the other call is cancelled.
- At most twice as many tasks as slots are being answered or stored; with those that wait for a retry they are at most twice as
  many as the slots that the servers may ever be given.
- Nothing polls a server for work: the run sleeps until a call ends, or until the next moment at which time alone lets one start.
"""

import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from agents import tokens
from agents.attempts import Call
from agents.budget import Budget, Reservation
from agents.endpoints import EndpointState, LaneState, open_endpoints
from agents.lanes import Idle, Lane, LaneEvent, LaneView
from agents.policy import AT_ONCE, Policy, faster_ones_do, free_lanes_make_it
from agents.requests import Requests
from agents.task import Completion, Outcome, Task
from agents.watch import watchers
from config.errors import BudgetExceeded, ConfigError, ProviderError, ProviderUnavailable

NEVER_ANSWERED_S = 10.0  # a run whose lanes have never answered is given up sooner: it is set up wrongly
_LOOK_AGAIN_S = 5.0  # what depends on the pace of other lanes is looked at this often
_SAY_AGAIN_S = 30.0  # the same reason of the same lane is not told more often
_PROBE_S = 5.0
_BURST = 100  # tasks handed out before the calls begun get to send: what is counted as sent now should not be sent much later
_TOLD: frozenset[Idle] = frozenset({"rate", "threshold", "lease", "free_first"})
_PACED: frozenset[Idle] = frozenset({"tail", "free_first", "swap", "measuring", "threshold", "lease"})


class TaskSource(Protocol):
    def next(self, domains: Collection[str]) -> Task | None:
        """A task of one of these domains; None: nothing now, because all that is missing is in flight or the target is met."""
        ...

    def remaining(self) -> int:
        """Tasks that are still to be handed out, as far as is known now."""
        ...


@dataclass(frozen=True)
class RunEnd:
    """`message` says what a person should know about the end; empty where all went as planned."""

    reason: Literal["done", "drained", "budget"]
    message: str


@dataclass(frozen=True)
class _Run:
    source: TaskSource
    on_outcome: Callable[[Outcome], Awaitable[None]]
    group: TaskGroup
    beside: TaskGroup  # what is not waited for at the end
    started: float


class Scheduler:
    """One run over some lanes.

    Args:
        routes: domain -> names of lanes that may serve it, in order of preference; the domains of all tasks are in it.
        clock: seconds; must run at the pace of the event loop's clock. Where endpoints are shared with other processes it has to
            be the same clock in all of them (time.monotonic).
        on_event: is told what a reader of the log wants to know.

    Raises:
        ConfigError: names that do not fit together, or a paid lane whose price is unknown under a budget.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        routes: Mapping[str, Sequence[str]],
        budget: Budget,
        policy: Policy = AT_ONCE,
        *,
        clock: Callable[[], float] = anyio.current_time,
        on_event: Callable[[LaneEvent], None] = lambda event: None,
    ) -> None:
        _check(lanes, routes, budget)
        self._lanes = open_endpoints(lanes)
        self._endpoints = list({state.endpoint: None for state in self._lanes})
        self._routes = {domain: self._route(names) for domain, names in routes.items()}
        self._budget = budget
        self._policy = policy
        self._clock = clock
        self._on_event = on_event
        self._requests = Requests(self._lanes, budget, clock, self._wake, on_event)
        self._in_hand = 0
        self._waiting: deque[Call] = deque()
        self._running: set[Call] = set()
        self._dry: Collection[str] = ()  # domains that a lane could take, and of which the source has nothing
        self._said: dict[tuple[LaneState, Idle], float] = {}
        self._stop: Literal["drained", "budget"] | None = None
        self._failure: Exception | None = None
        self._store_failed = False
        self._changed: anyio.Event | None = None

    async def run(self, source: TaskSource, on_outcome: Callable[[Outcome], Awaitable[None]]) -> RunEnd:
        """Work until the source has nothing left, `drain` is called, or the money is spent.

        `on_outcome` is awaited before its task leaves the hand, also when the run is cancelled meanwhile.

        Raises:
            ProviderUnavailable: no lane that may serve a task answers any more.
            AuthFailed, ModelMissing, BadRequest: the lanes are closed for good, because of this.
            Exception: what `source` or `on_outcome` raised, as it was.
        """
        run = _Run(source, on_outcome, anyio.create_task_group(), anyio.create_task_group(), self._clock())
        try:
            async with run.group, run.beside:
                for watch in watchers(self._endpoints, self._clock, self._wake):
                    run.beside.start_soon(self._carry_failure, run, watch)
                await self._carry_failure(run, self._dispatch, run)
                run.beside.cancel_scope.cancel()
        finally:
            await self._give_back(run)
        if self._failure is not None:
            raise self._failure
        return RunEnd(self._stop or "done", self._message())

    def drain(self) -> None:
        """Start nothing new; what runs is finished and `run` returns. Calls whose answers are kept for later are left."""
        self._stop = self._stop or "drained"
        for call in self._running:
            for lane, scope in call.racing.items():
                if lane.lane.keeps:
                    scope.cancel()
        self._wake()

    def views(self) -> list[LaneView]:
        """What each lane is doing now."""
        return [state.view() for state in self._lanes]

    # --- handing out -------------------------------------------------------------------------------------------------

    async def _dispatch(self, run: _Run) -> None:
        while True:
            self._changed = anyio.Event()
            now = self._clock()
            if self._stop is None:
                self._admit(run, now)
                self._check_dead_ends(now)
            if self._stop is not None:
                self._note_stopping()
                await self._give_back(run)
            if self._in_hand == 0:
                return
            with anyio.move_on_after(self._next_moment(now) - now):
                await self._changed.wait()
            # An event that was set just before the run was cancelled hides this: nothing may be started any more.
            await anyio.lowlevel.checkpoint_if_cancelled()

    def _admit(self, run: _Run, now: float) -> None:
        """Start what can start: waiting calls first, then new tasks while a lane may take them."""
        for endpoint in self._endpoints:
            if endpoint.breaker.wants_probe(now) and not endpoint.probing:
                run.beside.start_soon(self._carry_failure, run, self._probe, endpoint)
        for _ in self._lanes:  # as often as turns can pass at once
            self._refresh_turns(self._left(run), now)
            for _ in range(len(self._waiting)):
                call = self._waiting.popleft()
                if not self._place(call, run, now):
                    self._waiting.append(call)  # a full round keeps the order
            self._dry = self._take_new(run, now)
            if not self._has_room or not self._pass_turns(now):
                break
        if self._dry:
            self._hedge(run, now)
        for lane in self._lanes:
            self._note_idle(lane, run, now)
            if (found := lane.endpoint.limit_news(now)) is not None:
                self._on_event(LaneEvent(lane.name, "limit", f"{lane.endpoint.spec.key} bears {found} calls at once"))

    def _take_new(self, run: _Run, now: float) -> Collection[str]:
        """Hand out new tasks while lanes have room. Returns the domains that a lane could take and the source had nothing of."""
        stuck: set[str] = set()  # domains whose task no lane would start after all
        most = self._in_hand + _BURST
        while self._has_room:
            if self._in_hand >= most:
                self._wake()
                break
            left = self._left(run)
            domains = [domain for domain in self._routes if domain not in stuck and self._takes(domain, run, left, now)]
            task = run.source.next(domains) if domains else None
            if task is None and self._in_hand == 0:  # also without room: it shows whether there is anything to wait for
                task = run.source.next(self._routes)
            if task is None:
                return () if stuck else domains or (self._routes if self._in_hand == 0 else ())
            self._in_hand += 1
            call = Call(task)
            if not self._place(call, run, now):
                self._waiting.append(call)
                stuck.add(task.domain)
        return ()

    @property
    def _has_room(self) -> bool:
        """For another task. Those that wait for a retry take no slot: they do not keep a slot idle, but are bounded, too."""
        active = self._in_hand - len(self._waiting)
        slots = max(1, sum(endpoint.limit for endpoint in self._endpoints))
        return active < 2 * slots and self._in_hand < 2 * sum(endpoint.most for endpoint in self._endpoints)

    def _left(self, run: _Run) -> int:
        return run.source.remaining() + len(self._waiting)

    def _why_not(self, lane: LaneState, domain: str, run: _Run, left: int, now: float) -> Idle:
        """Why a lane may not start a call for a domain now; empty: it may."""
        if reason := lane.why_not(now):
            return reason
        route, policy = self._routes[domain], self._policy
        if policy.paid == "when_late" and policy.deadline_s is not None:
            if free_lanes_make_it(route, left, now - run.started, policy.deadline_s, now):
                if lane.lane.paid:
                    return "free_first"
                route = [other for other in route if not other.lane.paid]  # no use waiting for one that is not wanted
        return "tail" if faster_ones_do(lane, route, left, now) else ""

    def _takes(self, domain: str, run: _Run, left: int, now: float) -> bool:
        return any(not self._why_not(lane, domain, run, left, now) for lane in self._routes[domain])

    def _place(self, call: Call, run: _Run, now: float) -> bool:
        """Start a call on the first lane of its route that may take it. False: none may."""
        for lane in self._routes[call.task.domain]:
            if call.not_before.get(lane, now) > now:
                continue
            if self._why_not(lane, call.task.domain, run, self._left(run) + 1, now):
                continue
            if self._start(call, lane, run, now):
                return True
            self._wake()  # its state has changed: a lane that left the task to it may want it now
        return False

    def _start(self, call: Call, lane: LaneState, run: _Run, now: float) -> bool:
        """Reserve the money, claim the rate, go. False: one of them does not allow it."""
        held = None
        if lane.lane.paid:
            try:
                held = self._budget.reserve(lane.lane.price, call.task.messages, call.task.sampling, lane.lane.thinking_tokens)
            except BudgetExceeded as error:
                if self._budget.outstanding:
                    lane.out_of_money = True
                else:
                    self._close(lane, error)
                return False
        endpoint = lane.endpoint
        tpm = endpoint.spec.tpm
        expected = min(tpm, tokens.likely(call.task.messages) + call.task.sampling.max_tokens) if tpm else 1
        if not endpoint.claim(now, expected):
            if held is not None:
                self._budget.release(held)
            return False
        if endpoint.turns and endpoint.turns.started(lane.name, now):
            endpoint.concurrency.disturbed(now)
            self._on_event(LaneEvent(lane.name, "swap", f"{endpoint.spec.key} loads {lane.lane.model}"))
        lane.in_flight += 1
        scope = call.begin(lane, now)
        self._running.add(call)
        run.group.start_soon(self._carry_failure, run, self._serve, run, call, lane, scope, held, expected)
        return True

    def _refresh_turns(self, left: int, now: float) -> None:
        for endpoint in self._endpoints:
            if endpoint.turns:
                lanes = [lane for lane in self._lanes if lane.endpoint is endpoint and lane.closed_by is None]
                known = [lane.latency_s for lane in lanes if lane.latency_s]
                call_s = sum(known) / len(known) / max(1, endpoint.limit) if known else 1.0
                endpoint.turns.refresh(now, endpoint.in_flight, left, call_s, [lane.name for lane in lanes])

    def _pass_turns(self, now: float) -> bool:
        """End the turns that found no work. True: another lane's turn may begin at once."""
        passed = [lane.endpoint for lane in self._lanes if lane.endpoint.turns and not lane.why_not(now)]
        for endpoint in passed:
            if endpoint.turns:
                endpoint.turns.starved()
        return any(endpoint.in_flight == 0 for endpoint in passed)

    def _note_idle(self, lane: LaneState, run: _Run, now: float) -> None:
        left = self._left(run)
        served = [domain for domain, route in self._routes.items() if lane in route and domain not in self._dry]
        reasons = [self._why_not(lane, domain, run, left, now) for domain in served]
        reason: Idle = min(reasons, default="no_work")  # the empty one, if one of its domains may be served
        if not reason and not self._has_room:
            reason = "storing"
        if lane.endpoint.in_flight >= (lane.endpoint.spec.slots or math.inf):
            reason = ""  # every slot works
        if lane.note_idle(now, reason) and reason in _TOLD and now >= self._said.get((lane, reason), -math.inf) + _SAY_AGAIN_S:
            self._said[lane, reason] = now
            wait_s = lane.ready_at(now) - now
            self._on_event(LaneEvent(lane.name, "idle", f"{reason} for {wait_s:.0f} s" if 1 <= wait_s < math.inf else reason))

    def _note_stopping(self) -> None:
        for lane in self._lanes:
            lane.note_idle(self._clock(), "stopping")

    def _hedge(self, run: _Run, now: float) -> None:
        """Nothing waits: let idle lanes race calls that take far longer than their lane usually does."""
        for call in [call for call in self._running if call.straggles_at() <= now]:
            for lane in self._routes[call.task.domain]:
                allowed = (self._policy.hedge_paid or not lane.lane.paid) and call.not_before.get(lane, now) <= now
                if allowed and lane not in call.racing and not lane.why_not(now) and self._start(call, lane, run, now):
                    break

    async def _probe(self, endpoint: EndpointState) -> None:
        """Ask a server that was down for something free."""
        lane = next(lane for lane in self._lanes if lane.endpoint is endpoint)
        started = self._clock()
        endpoint.probing = True
        try:
            with anyio.fail_after(_PROBE_S):
                await lane.lane.provider.models()
        except (ProviderUnavailable, TimeoutError):
            endpoint.breaker.failed(self._clock(), started)
        except ProviderError:  # a refusal is an answer, too: not every server lists its models
            endpoint.breaker.found()
        else:
            endpoint.breaker.found()
        finally:
            endpoint.probing = False
            self._wake()

    def _check_dead_ends(self, now: float) -> None:
        """A task that no lane will ever take ends the run: with "budget" if money is what is missing, else by raising."""
        for domain in {call.task.domain for call in self._waiting}:
            lanes = self._routes[domain]
            usable = [lane for lane in lanes if lane.closed_by is None]
            if not usable:
                causes = [lane.closed_by for lane in lanes if lane.closed_by]
                if any(isinstance(cause, BudgetExceeded) for cause in causes):
                    self._stop = "budget"
                    return
                raise causes[-1]
            if now >= self._give_up_at(usable):
                last = usable[-1].last_error
                raise ProviderUnavailable(f"no lane answers: {last}", hint=last.hint if last else "") from last

    def _give_up_at(self, lanes: Sequence[LaneState]) -> float:
        """When the lanes will have been without an answer for too long; inf where one of them is not in trouble."""
        return max(self._despair_at(lane.endpoint) for lane in lanes)

    def _despair_at(self, endpoint: EndpointState) -> float:
        if endpoint.unanswered_since is None:
            return math.inf
        if endpoint.breaker.down and not any(lane.ok for lane in self._lanes):
            return endpoint.unanswered_since + min(self._policy.give_up_s, NEVER_ANSWERED_S)
        return endpoint.unanswered_since + self._policy.give_up_s

    def _next_moment(self, now: float) -> float:
        """When time alone next changes something: a lane opens, a wait is over, or the run is given up."""
        moments = [lane.ready_at(now) for lane in self._lanes]
        moments += [moment for call in self._waiting for moment in call.not_before.values()]
        moments += [self._despair_at(endpoint) for endpoint in self._endpoints]
        if any(lane.idle in _PACED for lane in self._lanes):
            moments.append(now + _LOOK_AGAIN_S)
        if self._dry:
            moments += [call.straggles_at() for call in self._running]
            moments += [moment for call in self._running for moment in call.not_before.values()]
        return min((moment for moment in moments if moment > now), default=math.inf)

    async def _give_back(self, run: _Run) -> None:
        """Let go of what waits."""
        while self._waiting:
            call = self._waiting.popleft()
            await self._let_go(run, call, f"{self._stop or 'cancelled'} before it was answered: {call.error}")

    async def _let_go(self, run: _Run, call: Call, error: str) -> None:
        """End a call without an answer. Only what may have been billed becomes an outcome: the rest is simply owed."""
        if call.cost_usd:
            await self._end(run, call.outcome(None, error))
        else:
            self._in_hand -= 1

    # --- one call ----------------------------------------------------------------------------------------------------

    async def _serve(
        self, run: _Run, call: Call, lane: LaneState, scope: anyio.CancelScope, held: Reservation | None, expected: int
    ) -> None:
        started = self._clock()
        result: Completion | ProviderError | None = None
        try:
            with scope:
                result = await self._requests.ask(call, lane, held, expected)
        except BaseException as error:  # cancelled, as a rule: what was sent may be billed all the same
            if not call.racing and not call.won:
                self._running.discard(call)
                await self._let_go(run, call, str(error) if isinstance(error, Exception) else "cancelled before it was answered")
            raise
        if result is None:
            await self._take_leaving(run, call, lane, started)
        elif isinstance(result, Completion) and await call.win(lane):
            self._running.discard(call)
            await self._end(run, call.outcome(result))
        elif isinstance(result, ProviderError):
            await self._take_error(run, call, lane, result, started)

    async def _take_leaving(self, run: _Run, call: Call, lane: LaneState, started: float) -> None:
        """A request was cancelled by itself: it lost a race, or its answer is kept for a later run."""
        lane.endpoint.breaker.left(started)
        if not call.racing and not call.won:
            self._running.discard(call)
            await self._let_go(run, call, "left before it was answered")
            self._wake()

    async def _take_error(self, run: _Run, call: Call, lane: LaneState, error: ProviderError, started: float) -> None:
        was_down, was_open = lane.endpoint.breaker.down, lane.closed_by is None
        again = call.heed(lane, error, started, self._clock())
        if was_open and lane.closed_by is not None:
            self._on_event(LaneEvent(lane.name, "closed", str(error)))
        if lane.endpoint.breaker.down != was_down:  # a refusal is an answer: it may be back with no more than that
            self._on_event(LaneEvent(lane.name, "back" if was_down else "down", str(error)))
        self._wake()
        if call.racing or call.won:
            return  # another request for this task still runs, or has been answered
        self._running.discard(call)
        if again:
            self._waiting.append(call)
        else:
            await self._end(run, call.outcome(None, str(error)))

    async def _end(self, run: _Run, ended: Outcome) -> None:
        # Shielded: the answer is there and maybe paid for, so it is stored even when the run is being cancelled.
        with anyio.CancelScope(shield=True):
            if not self._store_failed:
                await self._store(run, ended)
        self._in_hand -= 1
        self._wake()

    async def _store(self, run: _Run, ended: Outcome) -> None:
        try:
            await run.on_outcome(ended)
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
            self._note_stopping()
            run.group.cancel_scope.cancel()

    def _route(self, names: Sequence[str]) -> list[LaneState]:
        by_name = {state.name: state for state in self._lanes}
        return sorted((by_name[name] for name in names), key=lambda state: state.lane.paid)

    def _close(self, lane: LaneState, error: BudgetExceeded) -> None:
        lane.close_for_good(error)
        self._on_event(LaneEvent(lane.name, "closed", str(error)))

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    def _message(self) -> str:
        closed = [f'lane "{state.name}" was closed: {state.closed_by}' for state in self._lanes if state.closed_by]
        return "; ".join(closed)


def _check(lanes: Sequence[Lane], routes: Mapping[str, Sequence[str]], budget: Budget) -> None:
    names = [lane.name for lane in lanes]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"lanes need names of their own, and there must be one: {', '.join(names) or 'none'}")
    for domain, route in routes.items():
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
