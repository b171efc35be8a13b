import random
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.gpu import GpuShare, LatencyTelemetry
from config.contracts.gpu import GpuReading

LOW, HIGH = 30.0, 60.0


def seen(foreign: float, own: float | None = 0.0, leased_to: str = "") -> GpuReading:
    return GpuReading(utilization=min(100.0, foreign + (own or 0.0)), own_share=own, leased_to=leased_to)


def after(*steps: tuple[float, GpuReading | None], share: GpuShare | None = None, begin: float = 0.0, calls: int = 1) -> GpuShare:
    """A share that has been told, each for so many seconds, a reading a second."""
    share, now = share or GpuShare(LOW, HIGH), begin
    for lasting, reading in steps:
        for _ in range(round(lasting)):
            now += 1.0
            share.take(now, reading, calls)
    return share


@pytest.mark.parametrize(
    ("foreign", "share", "reason"),
    [(0, 1, ""), (29, 1, ""), (45, 0.5, "threshold"), (52.5, 0.25, "threshold"), (61, 0, "threshold"), (100, 0, "threshold")],
)
def test_a_steady_load_gives_its_share(foreign: float, share: float, reason: str) -> None:
    found = after((30, seen(foreign)))
    assert found.share == pytest.approx(share, abs=0.01) and found.reason == reason


def test_its_own_load_is_not_counted_against_a_lane() -> None:
    assert after((30, seen(5, own=95))).share == 1
    assert after((30, seen(70, own=25))).share == 0
    assert after((30, GpuReading(utilization=40, own_share=90))).share == 1, "samples of different moments"


def test_before_anything_is_known_all_slots_are_taken() -> None:
    assert GpuShare(LOW, HIGH).share == 1
    assert after((100, None)).share == 1 and after((100, None)).reason == ""


loads = st.floats(0, 100)


@given(st.lists(loads, max_size=30), st.floats(0, 29.9))
def test_under_low_all_slots_come_back_whatever_was_before(before: list[float], low: float) -> None:
    found = after(*((1, seen(load)) for load in before), (40, seen(low)))
    assert found.share == 1 and found.reason == ""


@given(st.lists(loads, max_size=30), st.floats(60.1, 100))
def test_over_high_nothing_new_whatever_was_before(before: list[float], high: float) -> None:
    found = after(*((1, seen(load)) for load in before), (40, seen(high)))
    assert found.share == 0 and found.reason == "threshold"


@given(loads, loads)
def test_more_load_never_gives_more_slots(one: float, other: float) -> None:
    less, more = after((20, seen(min(one, other)))), after((20, seen(max(one, other))))
    assert 0 <= more.share <= less.share <= 1


@given(st.lists(st.floats(-4, 4), min_size=60, max_size=60), st.sampled_from([LOW, HIGH]), st.sampled_from([0.0, 100.0]))
def test_a_load_that_trembles_around_a_threshold_crosses_it_once(tremble: list[float], threshold: float, before: float) -> None:
    share, now = after((20, seen(before))), 20.0
    sides = []
    for off in tremble:
        now += 1.0
        share.take(now, seen(threshold + off), 1)
        sides.append(share.share == (1.0 if threshold == LOW else 0.0))
    assert sum(one != other for one, other in zip(sides, sides[1:], strict=False)) <= 1


def test_a_lease_closes_at_once_and_its_end_opens_at_once() -> None:
    share = after((10, seen(0)))
    share.take(11, seen(0, leased_to="sft-0001"), 4)
    assert share.share == 0 and share.reason == "lease" and not share.silence_wanted(11)
    after((3600, seen(99, leased_to="sft-0001")), share=share, begin=11)
    assert share.share == 0
    share.take(3700, seen(3), 0)
    assert share.share == 1 and share.reason == "", "what the training caused is forgotten with it"


@pytest.mark.parametrize("last", [seen(100), seen(10, leased_to="sft-0001")])
def test_telemetry_that_is_lost_frees_the_lane_after_half_a_minute(last: GpuReading) -> None:
    share = after((10, last), (30, None))
    assert share.share == 0
    after((1, None), share=share, begin=40)
    assert share.share == 1 and share.reason == "stale"
    after((1, seen(0)), share=share, begin=60)
    assert share.reason == ""


# --- where own load is not told apart ---------------------------------------------------------------------------------------


def test_only_what_is_seen_in_silence_counts() -> None:
    share = after((20, seen(100, own=None)), calls=3)
    assert share.share == 1, "it may all be its own"
    assert share.silence_wanted(20) and share.reason == "measuring"
    share.take(21, seen(100, own=None), 0)
    assert share.share == 1, "the mean of a second that was not silent"
    share.take(22, seen(10, own=None), 0)
    assert share.share == 1 and not share.silence_wanted(22) and share.reason == ""


def test_a_game_is_found_in_silence_and_its_end_too() -> None:
    share = after((2, seen(95, own=None)), calls=0)
    assert share.share == 0 and share.reason == "threshold"
    after((8, seen(95, own=None)), share=share, begin=2, calls=0)
    assert not share.silence_wanted(10), "a lane that is closed is silent anyway"
    after((20, seen(1, own=None)), share=share, begin=10, calls=0)
    assert share.share == 1


@given(st.lists(st.tuples(st.floats(0.5, 5), st.integers(0, 30)), max_size=60))
def test_silence_is_wanted_rarely_and_briefly(moments: list[tuple[float, int]]) -> None:
    """A lane that obeys, whose running calls end after some time: silences are half a minute apart, and few."""
    share, now, in_flight = GpuShare(LOW, HIGH), 0.0, 4
    silent_s, ends, wanted = 0.0, [], False
    for step, drain in moments * 5:
        now += step
        silent_s += step if wanted else 0.0
        if wanted:
            in_flight = max(0, in_flight - 1) if drain % 2 else 0
        share.take(now, seen(50, own=None), in_flight)
        was, wanted = wanted, share.silence_wanted(now)
        if was and not wanted:
            ends.append(now)
        in_flight = in_flight if wanted else 4
    assert all(later - earlier >= 30 for earlier, later in zip(ends, ends[1:], strict=False))
    assert silent_s <= 60 + now / 4


def test_silence_is_not_wanted_from_a_gpu_that_does_not_answer() -> None:
    share = after((1, seen(50, own=None)))
    assert share.silence_wanted(20) and not share.silence_wanted(32)
    after((60, None), share=share, begin=1)
    assert not share.silence_wanted(61)
    share.take(100, seen(50, own=None), 2)
    assert share.silence_wanted(100)
    after((2, seen(0, own=None)), share=share, begin=100, calls=0)
    after((29, seen(50, own=None)), share=share, begin=102)
    assert not share.silence_wanted(131) and share.silence_wanted(132), "what was lost is not held against it"


def test_a_long_silence_makes_the_next_one_wait_longer() -> None:
    share = after((60, seen(50, own=None)), calls=1)
    after((2, seen(0, own=None)), share=share, begin=60, calls=0)
    assert not share.silence_wanted(600)


# --- the lane's own speed ---------------------------------------------------------------------------------------------------


def speed(*phases: tuple[float, float, int, float], seed: int = 0, models: str = "a") -> Callable[[], Any]:
    """Answers for so many seconds, each of such a latency with so many in flight, under a foreign load in %; then a reading.

    Phase n is of the model `models`[n], the last one of all that follow.
    """

    async def work() -> float | None:
        telemetry, draws = LatencyTelemetry(), random.Random(seed)
        for number, (lasting, latency, at_once, load) in enumerate(phases):
            model = models[min(number, len(models) - 1)]
            end = anyio.current_time() + lasting
            while anyio.current_time() < end:
                await anyio.sleep(latency)
                for left in range(at_once, 0, -1):
                    tokens = draws.randint(20, 60)
                    seconds = latency * tokens / 40 * draws.uniform(0.8, 1.2) / (1 - load / 100)
                    telemetry.observe(anyio.current_time(), seconds, tokens, left, model)
        reading = await telemetry.read()
        return reading.foreign if reading else None

    return work


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("load", "least", "most"), [(0, 0, 25), (50, 40, 60), (75, 65, 85)])
def test_a_lane_that_grows_slow_shows_the_load_of_others(
    virtual: Callable[..., Any], load: float, least: float, most: float, seed: int
) -> None:
    foreign = virtual(speed((20, 0.5, 4, 0), (30, 0.5, 4, load), seed=seed))
    assert least <= foreign <= most


def test_more_calls_at_once_are_no_foreign_load(virtual: Callable[..., Any]) -> None:
    assert virtual(speed((20, 0.2, 1, 0), (20, 0.8, 4, 0), (20, 1.6, 8, 0))) <= 25
    assert virtual(speed((20, 0.8, 4, 0), (20, 0.2, 1, 0), (20, 0.8, 4, 0))) <= 25


def test_a_slower_model_is_no_foreign_load(virtual: Callable[..., Any]) -> None:
    assert virtual(speed((20, 0.2, 4, 0), (20, 0.8, 4, 0), models="ab")) <= 25
    assert virtual(speed((20, 0.2, 4, 0), (20, 0.8, 4, 0), (20, 0.2, 4, 0), models="aba")) <= 25


def test_a_server_that_stays_slower_is_the_usual_after_a_while(virtual: Callable[..., Any]) -> None:
    assert virtual(speed((20, 0.2, 4, 0), (100, 0.8, 4, 0))) >= 60
    assert virtual(speed((20, 0.2, 4, 0), (700, 0.8, 4, 0))) <= 25


def test_answers_to_calls_from_before_a_change_tell_nothing(virtual: Callable[..., Any]) -> None:
    """Six calls that began alone are no measure for the sixty that wait for each other afterwards."""

    async def work() -> float | None:
        telemetry = LatencyTelemetry()
        await anyio.sleep(1)
        for _ in range(6):  # quick: they ran side by side before the server's queue was full
            telemetry.observe(anyio.current_time(), 0.2, 40, 8)
        for _ in range(10):
            await anyio.sleep(0.4)
            telemetry.observe(anyio.current_time(), 0.4, 40, 8)
        reading = await telemetry.read()
        return reading.foreign if reading else None

    assert virtual(work) == 0


def test_nothing_is_known_before_some_answers_and_long_after_the_last(virtual: Callable[..., Any]) -> None:
    async def work() -> list[object]:
        telemetry = LatencyTelemetry()
        found: list[object] = [await telemetry.read()]
        for _ in range(10):
            await anyio.sleep(0.5)
            telemetry.observe(anyio.current_time(), 0.5, 40, 2)
        found.append(await telemetry.read())
        await anyio.sleep(20)
        return [*found, await telemetry.read()]

    before, known, later = virtual(work)
    assert before is later is None
    assert known == GpuReading(utilization=0, own_share=0, source="latency")


def test_better_telemetry_goes_first_where_it_knows(virtual: Callable[..., Any]) -> None:
    class Known:
        reading: GpuReading | None = seen(77)

        async def read(self) -> GpuReading | None:
            return self.reading

    async def work() -> None:
        better = Known()
        telemetry = LatencyTelemetry(better)
        for _ in range(10):
            await anyio.sleep(0.5)
            telemetry.observe(anyio.current_time(), 0.5, 40, 2)
        assert await telemetry.read() == seen(77)
        better.reading = None
        reading = await telemetry.read()
        assert reading is not None and reading.source == "latency"

    virtual(work)
