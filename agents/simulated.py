"""A model server that is only described: it answers nothing of use, but takes the time and makes the faults of a real one.

- Made for the virtual clock (agents/virtual_time.py): all it does is sleep. The same seed and the same calls give the same end.
- It is a witness, too: `peak`, `busiest_minute`, `swaps` and `billed_usd` are what a real server would have seen, whatever the
  caller believes.
"""

import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import anyio

from agents import tokens
from agents.prices import Price
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.gpu import GpuReading
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, Overloaded, ProviderError, ProviderUnavailable, RateLimited

Fault = Literal["hang", "dropped", "503", "429", "429_wait", "429_day", "401", "400", "blocked", "cut"]
FAULTS: tuple[Fault, ...] = ("hang", "dropped", "503", "429", "429_wait", "429_day", "401", "400", "blocked", "cut")
_MINUTE_S = 60.0
_DAY_S = 86400.0


@dataclass(frozen=True)
class Window:
    """From `start` to `end`, in seconds of the clock."""

    start: float
    end: float

    def holds(self, now: float) -> bool:
        return self.start <= now < self.end


@dataclass(frozen=True)
class Behaviour:
    """How a server behaves. Times are in seconds; None is no limit.

    `latency_s` is the median time of an answer, `spread` the sigma of its lognormal distribution (0: always the median).
    `par` requests are answered at once, those beyond it wait in order, and those beyond `queue` waiting ones get a 503.
    `swap_s`: time to load another model once the running one is idle; 0: all are loaded. `cap` at once, `rpm`, `tpm` and
    `rpd` are limits beyond which it answers 429. `down`: it refuses connections and drops what runs. `gpu`: load of others on
    its GPU in %, which slows it. `faults` happen with the chance `fault_rate`; `answer_tokens` is the median answer.
    """

    latency_s: float = 1.0
    spread: float = 0.0
    par: int | None = None
    queue: int = 512
    swap_s: float = 0.0
    cap: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    rpd: int | None = None
    down: tuple[Window, ...] = ()
    gpu: tuple[tuple[Window, float], ...] = ()
    faults: tuple[Fault, ...] = ()
    fault_rate: float = 0.0
    answer_tokens: int = 40
    thinking_tokens: int = 0


@dataclass
class Seen:
    """What the server saw, in calls. `refused` counts by reason; `billed_usd` holds what broke off, too."""

    requests: int = 0
    answered: int = 0
    peak: int = 0
    busiest_minute: int = 0  # most requests in any 60 s
    swaps: int = 0
    billed_usd: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)


class SimulatedServer:
    """A Provider: see agents/providers/base.py. One instance is one server; lanes of several models may share it.

    Args:
        name: of the provider, as in provenance.
        prices: by model; what a call is billed at. A model that is absent is free.
        models: what it has; empty: every model.
        by_model: behaviour of a model where it is not the server's: its latency, tokens and faults.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        *,
        name: str = "simulated",
        seed: int = 0,
        prices: Mapping[str, Price] | None = None,
        models: Sequence[str] = (),
        by_model: Mapping[str, Behaviour] | None = None,
    ) -> None:
        self.name = name
        self.behaviour = behaviour
        self.seen = Seen()
        self.in_flight = 0
        self._prices = prices or {}
        self._models = list(models)
        self._by_model = by_model or {}
        self._random = random.Random(f"{seed} {name}")
        self._turns = _Turns(behaviour, self.seen) if behaviour.par or behaviour.swap_s else None
        self._minute: deque[tuple[float, int]] = deque()  # requests let in: when, with how many tokens
        self._minute_tokens = 0
        self._arrivals: deque[float] = deque()
        self._today: deque[float] = deque(maxlen=behaviour.rpd)

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """An answer of no content after the time it takes. Raises the errors that a real server's faults become."""
        started = anyio.current_time()
        self._arrived(started)
        usage = self._usage(model, messages, sampling)
        self._refuse_over_limits(started, usage.prompt_tokens)
        self.in_flight += 1
        self.seen.peak = max(self.seen.peak, self.in_flight)
        try:
            finish = await self._work(model, usage)
        finally:
            self.in_flight -= 1
        self.seen.answered += 1
        text = f"answer {self.seen.answered}" if finish != "blocked" else ""
        return Completion(text, finish, usage, model, anyio.current_time() - started, detail="" if finish == "stop" else finish)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        completion = await self.generate(model, messages, sampling)
        yield completion.text

    async def models(self) -> list[str]:
        if self._outage(anyio.current_time()):
            raise ProviderUnavailable(f"{self.name} cannot be reached", billable=False)
        return self._models

    async def aclose(self) -> None:
        """Nothing is open."""

    async def read(self) -> GpuReading:
        """The telemetry of its GPU: others' load, and the rest of it while a request runs here."""
        others = self._load(anyio.current_time())
        own = 100.0 - others if self.in_flight else 0.0
        return GpuReading(utilization=others + own, own_share=own, source="simulated")

    async def _work(self, model: str, usage: Usage) -> FinishReason:
        """The time of one request, and its fault. An outage that begins meanwhile drops it."""
        fault = self._fault(model)
        self._raise_at_once(fault)
        end = min((window.start for window in self.behaviour.down if window.start > anyio.current_time()), default=math.inf)
        turn: AbstractAsyncContextManager[None] = self._turns.turn(model) if self._turns else nullcontext()
        billed = False
        try:
            with anyio.move_on_at(end) if end < math.inf else nullcontext():
                async with turn:
                    billed = True
                    await (anyio.sleep_forever() if fault == "hang" else anyio.sleep(self._latency(model)))
                    return self._answer(fault)
            raise ProviderUnavailable(f"{self.name} dropped the connection", billable=billed)
        finally:
            if billed:
                self._bill(model, usage)

    def _answer(self, fault: Fault | None) -> FinishReason:
        if fault == "dropped":
            self.seen.refused["dropped"] += 1
            raise ProviderUnavailable(f"{self.name} dropped the connection")
        return "blocked" if fault == "blocked" else "length" if fault == "cut" else "stop"

    def _arrived(self, now: float) -> None:
        self.seen.requests += 1
        self._arrivals.append(now)
        while self._arrivals[0] <= now - _MINUTE_S:
            self._arrivals.popleft()
        self.seen.busiest_minute = max(self.seen.busiest_minute, len(self._arrivals))

    def _refuse_over_limits(self, now: float, prompt_tokens: int) -> None:
        """Raises where a server would refuse before it works: down, too many at once, a minute or a day."""
        limits = self.behaviour
        while self._minute and self._minute[0][0] <= now - _MINUTE_S:
            self._minute_tokens -= self._minute.popleft()[1]
        if self._outage(now):
            self._refused("down", ProviderUnavailable(f"{self.name} cannot be reached", billable=False))
        if limits.cap is not None and self.in_flight >= limits.cap:
            self._refused("429 at once", RateLimited(f"{self.name}: too many requests"))
        over_tokens = limits.tpm is not None and self._minute_tokens + prompt_tokens > limits.tpm
        if self._minute and (over_tokens or (limits.rpm is not None and len(self._minute) >= limits.rpm)):
            wait_s = self._minute[0][0] + _MINUTE_S - now
            self._refused("429 a minute", RateLimited(f"{self.name}: the minute's quota", retry_after_s=wait_s))
        if limits.rpd is not None and len(self._today) == limits.rpd and self._today[0] > now - _DAY_S:
            self._refused("429 a day", RateLimited(f"{self.name}: the day's quota", per_day=True))
        self._minute.append((now, prompt_tokens))
        self._minute_tokens += prompt_tokens
        if limits.rpd is not None:
            self._today.append(now)

    def _raise_at_once(self, fault: Fault | None) -> None:
        """The faults that cost a server no time."""
        error: ProviderError | None = None
        match fault:
            case "503":
                error = Overloaded(f"{self.name}: 503")
            case "429":
                error = RateLimited(f"{self.name}: 429")
            case "429_wait":
                error = RateLimited(f"{self.name}: 429", retry_after_s=self._random.choice([0.5, 2.0, 20.0]))
            case "429_day":
                error = RateLimited(f"{self.name}: the day's quota", per_day=True)
            case "401":
                error = AuthFailed(f"{self.name}: 401")
            case "400":
                error = BadRequest(f"{self.name}: 400")
        if error is not None and fault is not None:
            self._refused(fault, error)

    def _refused(self, reason: str, error: ProviderError) -> None:
        self.seen.refused[reason] += 1
        raise error

    def _of(self, model: str) -> Behaviour:
        return self._by_model.get(model, self.behaviour)

    def _fault(self, model: str) -> Fault | None:
        behaviour = self._of(model)
        faulty = bool(behaviour.faults) and self._random.random() < behaviour.fault_rate
        return self._random.choice(behaviour.faults) if faulty else None

    def _latency(self, model: str) -> float:
        behaviour = self._of(model)
        drawn = behaviour.latency_s * (self._random.lognormvariate(0, behaviour.spread) if behaviour.spread else 1.0)
        return drawn / max(0.1, 1 - self._load(anyio.current_time()) / 100)

    def _load(self, now: float) -> float:
        return next((percent for window, percent in self.behaviour.gpu if window.holds(now)), 0.0)

    def _outage(self, now: float) -> bool:
        return any(window.holds(now) for window in self.behaviour.down)

    def _usage(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Usage:
        behaviour = self._of(model)
        answer = behaviour.answer_tokens * self._random.lognormvariate(0, 0.3)
        thinking = min(behaviour.thinking_tokens, sampling.max_tokens - 1)
        return Usage(tokens.likely(messages), max(1, min(round(answer), sampling.max_tokens - thinking)), thinking)

    def _bill(self, model: str, usage: Usage) -> None:
        if price := self._prices.get(model):
            self.seen.billed_usd += price.cost(usage)


@dataclass(eq=False)
class _Turn:
    model: str
    came: anyio.Event
    loads: bool = False  # nobody else may enter before it has loaded its model


class _Turns:
    """`par` at once, one model in memory: first come, first served; the head of the queue holds up those behind it."""

    def __init__(self, behaviour: Behaviour, seen: Seen) -> None:
        self._par = behaviour.par or math.inf
        self._queue_limit, self._swap_s = behaviour.queue, behaviour.swap_s
        self._seen = seen
        self._queue: deque[_Turn] = deque()
        self._active = 0
        self._loaded = ""
        self._loading = False

    @asynccontextmanager
    async def turn(self, model: str) -> AsyncIterator[None]:
        """Wait for a turn. Raises Overloaded where too many wait."""
        if len(self._queue) >= self._queue_limit:
            self._seen.refused["503 queue"] += 1
            raise Overloaded("server busy, please try again.  maximum pending requests exceeded")
        turn = _Turn(model, anyio.Event())
        self._queue.append(turn)
        self._let_in()
        try:
            await turn.came.wait()
            if turn.loads:
                await self._load(turn)
            yield
        finally:
            self._leave(turn)

    async def _load(self, turn: _Turn) -> None:
        self._seen.swaps += 1
        await anyio.sleep(self._swap_s)
        self._loaded = turn.model
        turn.loads = self._loading = False
        self._let_in()

    def _leave(self, turn: _Turn) -> None:
        if turn.came.is_set():
            self._active -= 1
        else:
            self._queue.remove(turn)
        if turn.loads:  # it was cancelled on the way
            self._loading = False
        self._let_in()

    def _let_in(self) -> None:
        while self._queue and not self._loading and self._active < self._par:
            turn = self._queue[0]
            swaps = bool(self._swap_s) and turn.model != self._loaded
            if swaps and self._active:
                return
            self._queue.popleft()
            self._active += 1
            turn.loads = self._loading = swaps
            turn.came.set()
