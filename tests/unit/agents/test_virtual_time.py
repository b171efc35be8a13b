import anyio
import pytest

from agents.virtual_time import run_virtual


def test_time_jumps_to_the_next_timer() -> None:
    async def work() -> list[float]:
        seen = []

        async def one(seconds: float) -> None:
            await anyio.sleep(seconds)
            seen.append(anyio.current_time())

        async with anyio.create_task_group() as group:
            for seconds in (86400.0, 1.0, 3600.0):
                group.start_soon(one, seconds)
        return seen

    assert run_virtual(work) == pytest.approx([1.0, 3600.0, 86400.0])


def test_timeouts_are_virtual_too() -> None:
    async def work() -> float:
        with anyio.move_on_after(100):
            await anyio.sleep_forever()
        return anyio.current_time()

    assert run_virtual(work) == pytest.approx(100)


def test_a_run_that_would_sleep_for_ever_is_an_error() -> None:
    async def work() -> None:
        await anyio.Event().wait()

    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtual(work)
