import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.lanes import Lane, LaneState, RpmWindow
from agents.prices import Price
from config.errors import BadRequest, Blocked, ConfigError, ProviderUnavailable, RateLimited
from tests.fakes.fake_provider import FakeProvider


def state(slots: int = 4, rpm: int | None = None) -> LaneState:
    return LaneState(Lane("gpu", FakeProvider([]), "m", slots, rpm=rpm))


@given(st.integers(1, 8), st.lists(st.floats(0, 30), max_size=60))
def test_any_sixty_seconds_hold_no_more_than_rpm(rpm: int, pauses: list[float]) -> None:
    window, now, starts = RpmWindow(rpm), 0.0, []
    for pause in pauses:
        now = max(now + pause, window.ready_at())
        window.started(now)
        starts.append(now)
    assert all(later - earlier > 60 for earlier, later in zip(starts, starts[rpm:], strict=False))


def test_only_ones_own_machine_is_free_without_a_price() -> None:
    assert not Lane("a", FakeProvider([], name="ollama"), "m", 1).paid
    assert Lane("a", FakeProvider([], name="gemini"), "m", 1).paid
    assert Lane("a", FakeProvider([], name="ollama"), "m", 1, price=Price(1, 1)).paid


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"slots": 1, "rpm": 0}])
def test_a_lane_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match='lane "a"'):
        Lane("a", FakeProvider([]), "m", **wrong)


def test_rate_limits_lower_the_limit_to_what_is_served_and_answers_raise_it() -> None:
    lane = state(slots=8)
    for _ in range(8):
        lane.started(0.0)
    for _ in range(5):
        lane.in_flight -= 1
        lane.rate_limited(RateLimited("429"), 0.0, wait_s=30)
    assert lane.limit == 3 and not lane.has_room(0.0)
    assert lane.ready_at() < 0  # the three that are served go on at once when they end
    for _ in range(4):
        lane.answered()
    assert lane.limit == 4


def test_a_rate_limit_with_nothing_else_in_flight_pauses_the_lane() -> None:
    lane = state()
    lane.rate_limited(RateLimited("429"), 100.0, wait_s=30)
    assert lane.ready_at() == 130 and lane.limit == 1


def test_five_failures_close_it_and_each_closure_is_longer() -> None:
    lane, now, closures = state(), 0.0, []
    for _ in range(4):
        lane.unavailable(ProviderUnavailable("x"), now)
    assert lane.has_room(now) and not lane.down
    for _ in range(8):
        lane.unavailable(ProviderUnavailable("x"), now)
        lane.unavailable(ProviderUnavailable("x"), now)  # one that was still in flight changes nothing
        closures.append(lane.ready_at() - now)
        now = lane.ready_at()
    assert closures == [1, 2, 4, 8, 16, 32, 60, 60]
    assert lane.down and lane.limit == 1
    lane.answered()
    assert not lane.down and lane.failing_since is None


def test_a_refusal_is_an_answer() -> None:
    lane = state()
    for _ in range(4):
        lane.unavailable(ProviderUnavailable("x"), 0.0)
    lane.refused(Blocked("safety"), bad_request=False)
    lane.unavailable(ProviderUnavailable("x"), 0.0)
    assert not lane.down


def test_hopeless_is_five_bad_requests_in_a_row_and_never_an_answer() -> None:
    lane = state()
    for _ in range(5):
        lane.refused(BadRequest("404"), bad_request=True)
    assert lane.hopeless
    lane.refused(Blocked("safety"), bad_request=False)
    assert not lane.hopeless
    lane.answered()
    for _ in range(9):
        lane.refused(BadRequest("404"), bad_request=True)
    assert not lane.hopeless


def test_closed_for_good_names_the_first_cause() -> None:
    lane = state()
    lane.close_for_good(BadRequest("first"))
    lane.close_for_good(BadRequest("second"))
    assert lane.ready_at() == math.inf and str(lane.closed_by) == "first" and not lane.has_room(1e9)
