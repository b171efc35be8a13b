import math
from pathlib import Path

import pytest

from agents.endpoints import EndpointState, LaneState, open_endpoints
from agents.lanes import Endpoint, GpuThresholds, Lane
from agents.prices import Price
from agents.task import Usage
from config.contracts.gpu import GpuReading
from config.errors import BadRequest, ConfigError, RateLimited
from tests.fakes.fake_provider import FakeProvider


def lane(endpoint: Endpoint, name: str = "gpu", own: bool = True) -> Lane:
    return Lane(name, FakeProvider([]), "m", endpoint, own=own)


def endpoint(**limits: int | None) -> EndpointState:
    return open_endpoints([lane(Endpoint("server", **limits))])[0].endpoint  # type: ignore[arg-type]


def test_lanes_with_one_endpoint_share_its_slots() -> None:
    first, second = open_endpoints([lane(Endpoint("server", slots=3), "a"), lane(Endpoint("server", slots=3), "b")])
    assert first.endpoint is second.endpoint
    for _ in range(3):
        assert first.endpoint.claim(0.0, 1)
    assert first.why_not(0.0) == second.why_not(0.0) == "limit"


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"rpm": 0}, {"tpm": 0}, {"rpd": 0}])
def test_an_endpoint_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="server: slots, rpm"):
        Endpoint("server", **wrong)  # type: ignore[arg-type]


def test_only_what_is_not_ones_own_costs_money() -> None:
    free = Endpoint("server")
    assert not lane(free).paid and lane(free, own=False).paid
    assert Lane("a", FakeProvider([]), "m", free, price=Price(1, 1)).paid


def test_a_told_number_of_slots_is_divided_among_processes() -> None:
    told, found = endpoint(slots=6), endpoint()
    before = found.limit
    told.sharers = found.sharers = 4
    assert told.limit == 1 and found.limit == before


def test_a_ceiling_that_processes_share_is_felt_and_left_together() -> None:
    """Two processes with 64 slots, at a server that bears 33: each sees a half of everything."""
    state = endpoint(slots=64)
    state.sharers = 2
    for _ in range(32):
        state.claim(0.0, 1)
    for _ in range(16):
        state.in_flight -= 1
        state.refused(0.1, started=0.0, wait_s=1.0)
    assert state.limit == 16
    for now in range(2, 8):
        for _ in range(40):
            state.in_flight = state.limit
            state.answered(float(now), started=now - 0.2, usage=Usage(1, 1), model="m")
    assert state.limit > 16


def test_a_found_limit_is_told_when_it_is_sure_and_not_again_before_it_has_clearly_changed() -> None:
    state, told = endpoint(slots=64), []

    def serve(now: float, count: int) -> None:
        for _ in range(count):
            state.in_flight = state.limit
            state.answered(now, started=now - 0.2, usage=Usage(1, 1), model="m")
        told.append(state.limit_news(now))

    for left in range(63, 31, -1):
        state.in_flight = left
        state.refused(2.0, started=1.9, wait_s=1.0)
        assert state.limit_news(2.0) is None
    serve(2.3, 32)
    serve(40.0, 33)
    for _ in range(8):
        serve(50.0, 64)
    assert [limit for limit in told if limit is not None] == [32]


def test_a_claim_that_another_process_was_faster_at_is_looked_at_again_soon(tmp_path: Path) -> None:
    first, second = (EndpointState(Endpoint("server", tpm=100, shared=tmp_path), ["a"], own=True) for _ in range(2))
    assert first.claim(0.0, 90) and not second.claim(0.0, 60)
    assert 0.0 < second.ready_at(0.0) < math.inf


def test_a_refusal_that_says_something_else_is_an_answer() -> None:
    """A day that is used up ends at midnight, however long before the last answer came."""
    state = open_endpoints([lane(Endpoint("server"))])[0]
    state.endpoint.refused(0.0, started=0.0, wait_s=1.0)
    assert state.endpoint.unanswered_since == 0.0
    state.endpoint.heard()
    assert state.endpoint.unanswered_since is None


def test_one_429_beside_calls_that_are_served_does_not_pause_it() -> None:
    state = endpoint(slots=8)
    for _ in range(8):
        state.claim(0.0, 1)
    state.in_flight -= 1
    state.refused(0.1, started=0.0, wait_s=30.0)
    assert state.limit == 7 and state.ready_at(0.1) <= 0.1


def test_refusals_of_calls_that_start_afterwards_mean_the_minute_is_full() -> None:
    state = endpoint(slots=8)
    for _ in range(8):
        state.claim(0.0, 1)
    for now in (1.0, 2.0, 3.0):
        state.in_flight -= 1
        state.refused(now, started=now - 0.1, wait_s=30.0)
    assert state.ready_at(3.0) == 33.0


def test_an_answer_between_them_means_it_is_not() -> None:
    state = endpoint(slots=8)
    for _ in range(8):
        state.claim(0.0, 1)
    for now in (1.0, 2.0, 3.0, 4.0):
        state.refused(now, started=now - 0.1, wait_s=30.0)
        state.answered(now + 0.5, started=now, usage=Usage(1, 1), model="m")
    assert state.ready_at(5.0) <= 5.0


def test_others_on_the_gpu_take_its_slots_away_and_give_them_back() -> None:
    thresholds = GpuThresholds(30, 60, telemetry=None)  # type: ignore[arg-type]
    state = open_endpoints([lane(Endpoint("server", slots=4, gpu=thresholds))])[0]
    assert state.endpoint.gpu is not None

    def load(percent: float, seconds: range) -> None:
        for second in seconds:
            state.endpoint.gpu.take(float(second), GpuReading(utilization=percent, own_share=0.0), 0)  # type: ignore[union-attr]

    load(95, range(0, 40, 2))
    assert state.endpoint.limit == 0 and state.why_not(40.0) == "threshold"
    load(5, range(40, 120, 2))
    assert state.endpoint.limit == 4 and state.why_not(120.0) == ""


def closing_lane() -> LaneState:
    return open_endpoints([lane(Endpoint("server"))])[0]


def test_a_lane_that_only_ever_calls_requests_wrong_is_closed() -> None:
    state, error = closing_lane(), BadRequest("no such option")
    for _ in range(5):
        assert state.closed_by is None
        state.unanswered(error)
        state.refused(True)
    assert state.closed_by is error and state.why_not(0.0) == "closed" and state.ready_at(0.0) == math.inf


def test_three_days_without_an_answer_close_a_lane() -> None:
    state, error = closing_lane(), RateLimited("the day", per_day=True)
    state.empty_day(error)
    state.empty_day(error)
    state.answered(1.0, Usage(1, 1))
    state.empty_day(error)
    state.empty_day(error)
    assert state.closed_by is None
    state.empty_day(error)
    assert state.closed_by is error


def test_idle_time_is_counted_by_reason() -> None:
    state = closing_lane()
    assert state.note_idle(0.0, "rate") and not state.note_idle(5.0, "rate") and state.note_idle(8.0, "")
    state.note_idle(20.0, "swap")
    state.note_idle(21.0, "")
    assert state.view().idle_s == {"rate": 8.0, "swap": 1.0}


def test_processes_find_each_other_in_a_shared_folder(tmp_path: Path) -> None:
    first = EndpointState(Endpoint("server", rpm=2, shared=tmp_path), ["a"], own=True)
    second = EndpointState(Endpoint("server", rpm=2, shared=tmp_path), ["a"], own=True)
    assert first.claim(100.0, 1) and second.claim(100.0, 1)
    assert not first.claim(101.0, 1) and second.why_not(101.0) == "rate"
