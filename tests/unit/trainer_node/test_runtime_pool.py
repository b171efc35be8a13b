"""Who is loaded where memory is short. The engines are stand-ins: how much memory there is belongs to the test."""

import asyncio
from typing import Any, cast

import pytest

from trainer_node.runtime.engine import Engine, EngineSpec, NoRoom
from trainer_node.runtime.models import Model
from trainer_node.runtime.pool import Limits, Pool

SPECS = {name: EngineSpec(name, (), 64, 1, 1) for name in ("a", "b", "c")}


class Machine:
    """Room for so many engines."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.running: list[str] = []

    async def start(self, spec: EngineSpec, needed_bytes: int = 0) -> Engine:
        await asyncio.sleep(0)
        if len(self.running) >= self.room:
            raise NoRoom(500, "model requires more system memory")
        self.running.append(spec.weights)
        return StandIn(self, spec)


class StandIn(Engine):
    def __init__(self, machine: Machine, spec: EngineSpec) -> None:
        self._machine, self.spec = machine, spec

    @property
    def alive(self) -> bool:
        return self.spec.weights in self._machine.running

    async def stop(self) -> None:
        self._machine.running.remove(self.spec.weights)


def pool_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(Engine, "start", machine.start)
    return Pool(Limits(parallel=1, max_loaded=3))


async def use(pool: Pool, name: str) -> None:
    async with pool.use(cast(Model, Named(name)), SPECS[name], 60.0):
        return


class Named:
    def __init__(self, name: str) -> None:
        self.weights: Any = name


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
