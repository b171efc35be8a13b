"""Which models are loaded, and who may use them.

There is one engine per weights file: another adapter or context on the same weights replaces it, as in Ollama.
An engine is only replaced, evicted or expired while nobody uses it. Requests are admitted first come, first served; one that
would wait behind `max_queue` others is refused at once. Models are loaded one after the other, since the memory that one finds
free is taken only once it is loaded; what is to make room takes no more requests, so that no stream of them keeps a model out.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trainer_node.runtime.engine import Engine, EngineSpec, NoRoom
from trainer_node.runtime.memory import needed_bytes
from trainer_node.runtime.models import ApiError, Model, ModelName
from trainer_node.runtime.options import FOREVER_S

FOREVER = timedelta(microseconds=(2**63 - 1) // 1000)  # the longest duration of Go: what Ollama reports for "never"


@dataclass(frozen=True)
class Limits:
    """Read from the variables of Ollama that have the same meaning."""

    parallel: int = 4
    max_queue: int = 512
    max_loaded: int = 2

    @classmethod
    def from_environment(cls) -> "Limits":
        def number(name: str, default: int) -> int:
            text = os.environ.get(name, "")
            return int(text) if text.isdecimal() and int(text) else default

        return cls(
            number("OLLAMA_NUM_PARALLEL", cls.parallel),
            number("OLLAMA_MAX_QUEUE", cls.max_queue),
            number("OLLAMA_MAX_LOADED_MODELS", cls.max_loaded),
        )


@dataclass(eq=False)
class Loaded:
    """An engine and its users. `engine` is a task: all who want it wait for the same load."""

    model: Model
    spec: EngineSpec
    engine: asyncio.Task[Engine]
    slots: asyncio.Semaphore
    users: int = 0
    unwanted: bool = False  # an unload was asked for while it was in use
    leaving: bool = False  # another model waits for its memory
    closing: asyncio.Task[None] | None = None
    expires: datetime = field(default_factory=lambda: datetime.now(UTC))
    timer: asyncio.TimerHandle | None = None


class Pool:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._loaded: dict[str, Loaded] = {}  # by weights; the least recently used first
        self._door = asyncio.Lock()
        self._loading = asyncio.Lock()
        self._changed = asyncio.Event()
        self._waiting = 0

    def loaded(self) -> list[Loaded]:
        """What is loaded, still in use or being loaded, the last used first."""
        return [entry for entry in reversed(self._loaded.values()) if not _failed(entry)]

    @asynccontextmanager
    async def use(self, model: Model, spec: EngineSpec, keep_alive_s: float) -> AsyncIterator[Engine]:
        """Hold one slot of the model's engine, loaded if need be.

        Raises:
            ApiError: 503, too many wait already; 500, the model cannot be loaded.
        """
        if self._waiting >= self.limits.max_queue:
            raise ApiError(503, "server busy, please try again.  maximum pending requests exceeded")
        self._waiting += 1
        entry: Loaded | None = None
        admitted = False
        try:
            async with self._door:
                entry = await self._reserve(model, spec)
                entry.expires = _expiry(keep_alive_s)
            await entry.slots.acquire()
            admitted = True
            self._waiting -= 1
            yield await asyncio.shield(entry.engine)
        finally:
            if not admitted:
                self._waiting -= 1
            if entry:
                self._leave(entry, keep_alive_s, slot=admitted)

    async def unload(self, name: ModelName, weights: Path | None = None) -> None:
        """Free what is loaded under a name or of these weights now, or as soon as nobody uses it; waits only where it is idle.

        Both, because a name may have been made anew, or moved, since its model was loaded.
        """
        entries = [entry for entry in self._loaded.values() if entry.model.name == name or entry.spec.weights == str(weights)]
        for entry in entries:
            entry.unwanted = True
        idle = [self._close(entry) for entry in entries if not entry.users]
        if idle:
            await asyncio.wait(idle)

    async def close(self) -> None:
        closing = [self._close(entry) for entry in self._loaded.values()]
        if closing:
            await asyncio.wait(closing)

    async def _reserve(self, model: Model, spec: EngineSpec) -> Loaded:
        """The entry for `spec`, made if there is none; waits until what is in its way is unused."""
        while True:
            entry = self._loaded.get(spec.weights)
            if entry and entry.spec == spec and not (entry.closing or entry.leaving or _failed(entry)):
                break
            if not entry and len(self._loaded) < self.limits.max_loaded:
                entry = Loaded(model, spec, asyncio.create_task(self._load(spec)), asyncio.Semaphore(spec.parallel))
                break
            idle = [other for other in self._loaded.values() if not other.users and entry in (None, other)]
            if idle:
                await asyncio.shield(self._close(idle[0]))
            else:
                self._changed.clear()
                await self._changed.wait()
        self._loaded.pop(spec.weights, None)
        self._loaded[spec.weights] = entry
        entry.model = model
        entry.users += 1
        entry.unwanted = False
        if entry.timer:
            entry.timer.cancel()
        return entry

    async def _load(self, spec: EngineSpec) -> Engine:
        """Start an engine; others leave for it, the least recently used first, once nobody uses them. Raises ApiError."""
        needed = await asyncio.to_thread(needed_bytes, spec)
        async with self._loading:
            while True:
                others = [entry for entry in reversed(self.loaded()) if entry.engine.done()]
                mapped = sum(entry.engine.result().mapped_bytes for entry in others)
                try:
                    return await Engine.start(spec, needed + mapped)
                except NoRoom:
                    if not others:
                        raise
                await self._end_one(others)

    async def _end_one(self, others: list[Loaded]) -> None:
        """End an idle one; where there is none, the first that is idle, and the first of the list takes no more requests."""
        others[0].leaving = True
        try:
            while not (idle := [entry for entry in others if not entry.users]):
                self._changed.clear()
                await self._changed.wait()
            closing = self._close(idle[0])
        finally:
            others[0].leaving = False
            self._changed.set()
        await asyncio.shield(closing)

    def _leave(self, entry: Loaded, keep_alive_s: float, *, slot: bool) -> None:
        entry.users -= 1
        if slot:
            entry.slots.release()
        entry.expires = _expiry(keep_alive_s)
        if not entry.users and (entry.unwanted or keep_alive_s == 0.0 or _failed(entry)):
            self._close(entry)
        elif not entry.users and keep_alive_s != FOREVER_S:
            entry.timer = asyncio.get_running_loop().call_later(keep_alive_s, self._expire, entry)
        self._changed.set()

    def _expire(self, entry: Loaded) -> None:
        if not entry.users:
            self._close(entry)

    def _close(self, entry: Loaded) -> asyncio.Task[None]:
        """Start to end an engine, once; in a task of its own, so that no hang-up leaves it half closed."""
        if entry.timer:
            entry.timer.cancel()
        if entry.closing is None:
            entry.closing = asyncio.create_task(self._stop(entry))
        return entry.closing

    async def _stop(self, entry: Loaded) -> None:
        """The name leaves the list only once the memory is free."""
        entry.engine.cancel()
        (engine,) = await asyncio.gather(entry.engine, return_exceptions=True)
        if isinstance(engine, Engine):
            await engine.stop()
        if self._loaded.get(entry.spec.weights) is entry:
            del self._loaded[entry.spec.weights]
        self._changed.set()


def _expiry(keep_alive_s: float) -> datetime:
    return datetime.now(UTC) + (FOREVER if keep_alive_s == FOREVER_S else timedelta(seconds=keep_alive_s))


def _failed(entry: Loaded) -> bool:
    """Whether the engine could not be loaded, or has died since."""
    task = entry.engine
    return task.done() and (task.cancelled() or task.exception() is not None or not task.result().alive)
