"""Who is loaded where memory is short. The engines are stand-ins: how much memory there is belongs to the test."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from trainer_node.runtime.engine import Engine, EngineSpec, NoRoom
from trainer_node.runtime.models import Model
from trainer_node.runtime.options import FOREVER_S
from trainer_node.runtime.pool import Limits, Pool

SPECS = {name: EngineSpec(name, (), 64, 1, 1) for name in ("a", "b", "c")}


class Machine:
    """Room for so many engines. What a load finds free it takes only at its end."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.running: list[str] = []
        self.asked_bytes: list[int] = []
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def start(self, spec: EngineSpec, needed_bytes: int = 0) -> Engine:
        self.asked_bytes.append(needed_bytes)
        if len(self.running) >= self.room:
            raise NoRoom(500, "model requires more system memory")
        await asyncio.sleep(0.01)
        await self.may_load.wait()
        self.running.append(spec.weights)
        assert len(self.running) <= self.room
        return StandIn(self, spec)


class StandIn(Engine):
    def __init__(self, machine: Machine, spec: EngineSpec) -> None:
        self._machine, self.spec = machine, spec

    @property
    def alive(self) -> bool:
        return self.spec.weights in self._machine.running

    @property
    def mapped_bytes(self) -> int:
        return 7

    async def stop(self) -> None:
        self._machine.running.remove(self.spec.weights)


def pool_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(Engine, "start", machine.start)
    return Pool(Limits(parallel=1, max_loaded=3))


async def use(pool: Pool, name: str) -> None:
    async with pool.use(cast(Model, Named(name)), SPECS[name], 60.0):
        return


class Named:
    def __init__(self, weights: str, name: str = "") -> None:
        self.weights: Any = weights
        self.name: Any = name or weights


def test_the_least_recently_used_leaves_for_one_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(room=2)

    async def main() -> None:
        pool = pool_on(machine, monkeypatch)
        for name in ("a", "b", "a", "c"):
            await use(pool, name)
        assert sorted(machine.running) == ["a", "c"]
        await pool.close()

    asyncio.run(main())
    assert not machine.running


def test_one_that_does_not_fit_waits_for_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(room=1)

    async def main() -> None:
        pool = pool_on(machine, monkeypatch)
        async with pool.use(cast(Model, Named("a")), SPECS["a"], 60.0):
            second = asyncio.create_task(use(pool, "b"))
            await asyncio.wait([second], timeout=0.2)
            assert machine.running == ["a"] and not second.done()
        await second
        assert machine.running == ["b"]
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_where_nothing_can_leave_it_is_refused(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that load at once do not wait for each other."""

    async def main() -> list[Any]:
        pool = pool_on(Machine(room=0), monkeypatch)
        told = await asyncio.gather(*(use(pool, name) for name in names), return_exceptions=True)
        await pool.close()
        return told

    assert [type(error) for error in asyncio.run(main())] == [NoRoom] * len(names)


def test_two_that_load_at_once_do_not_take_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, and has its turn once nobody uses that one."""

    async def main() -> list[Any]:
        machine = Machine(room=1)
        pool = pool_on(machine, monkeypatch)
        told = await asyncio.gather(*(use(pool, name) for name in ("a", "b", "c")), return_exceptions=True)
        assert machine.running == ["c"]
        await pool.close()
        return told

    assert asyncio.run(main()) == [None] * 3


def test_what_others_map_is_not_counted_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        machine = Machine(room=3)
        pool = pool_on(machine, monkeypatch)
        for name in ("a", "b", "c", "a"):
            await use(pool, name)
        assert machine.asked_bytes == [0, 7, 14]  # the files of these models do not exist: they need nothing of their own
        await pool.close()

    asyncio.run(main())


def test_one_that_waits_for_memory_is_not_kept_out_by_a_stream_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        pool = pool_on(Machine(room=1), monkeypatch)
        ended = asyncio.Event()

        async def asks_again_before_its_answer_has_ended() -> None:
            while not ended.is_set():
                async with pool.use(cast(Model, Named("a")), replace(SPECS["a"], parallel=2), 60.0):
                    await asyncio.sleep(0.02)

        async def stream() -> None:
            async with asyncio.TaskGroup() as group:
                for delay_s in (0.0, 0.01):  # there is always one of the two
                    await asyncio.sleep(delay_s)
                    group.create_task(asks_again_before_its_answer_has_ended())

        streaming = asyncio.create_task(stream())
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            await use(pool, "b")
        ended.set()
        await streaming
        await pool.close()

    asyncio.run(main())


def test_what_is_being_loaded_is_listed_and_an_unload_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the memory of a GPU has to see what is about to take it."""

    async def main() -> None:
        machine = Machine(room=1)
        pool = pool_on(machine, monkeypatch)
        machine.may_load.clear()
        asking = asyncio.create_task(use(pool, "a"))
        await asyncio.sleep(0.05)
        assert [entry.spec.weights for entry in pool.loaded()] == ["a"]
        asking.cancel()  # its client hangs up; the load goes on for the next one
        await asyncio.wait([asking])
        assert [entry.spec.weights for entry in pool.loaded()] == ["a"]
        await pool.unload(Named("a").name)
        assert not pool.loaded() and not machine.running
        machine.may_load.set()
        await use(pool, "a")  # and the slot that it held is free
        await pool.close()

    asyncio.run(main())


def test_an_unload_of_a_name_ends_what_was_loaded_under_it_before_it_was_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        machine = Machine(room=3)
        pool = pool_on(machine, monkeypatch)
        for weights in ("a", "b"):
            async with pool.use(cast(Model, Named(weights, name="tag")), SPECS[weights], FOREVER_S):
                pass
        await use(pool, "c")
        await pool.unload(Named("tag").name, Named("b").weights)
        assert machine.running == ["c"]
        await pool.close()

    asyncio.run(main())


def test_a_model_that_is_kept_for_ever_expires_when_ollama_says(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        pool = pool_on(Machine(room=1), monkeypatch)
        async with pool.use(cast(Model, Named("a")), SPECS["a"], FOREVER_S):
            pass
        (entry,) = pool.loaded()
        assert (entry.expires - datetime.now(UTC)).days in (106750, 106751)  # 2**63 nanoseconds
        await pool.close()

    asyncio.run(main())
