from typing import Any

import pytest

from agents.endpoints import LaneState, open_endpoints
from agents.lanes import Endpoint, Lane
from agents.policy import faster_ones_do, free_lanes_make_it
from agents.prices import Price
from config.errors import AuthFailed
from tests.fakes.fake_provider import FakeProvider


def states(*lanes: tuple[str, int, float | None, bool], **more: Any) -> list[LaneState]:
    """Lanes of (name, slots, latency, paid)."""
    price = Price(1e-6, 1e-6)
    return open_endpoints(
        [
            Lane(
                name,
                FakeProvider([]),
                "m",
                Endpoint(name, slots=slots, **more),
                price=price if paid else None,
                own=not paid,
                typical_s=latency_s,
            )
            for name, slots, latency_s, paid in lanes
        ]
    )


@pytest.mark.parametrize(("left", "waits"), [(1, True), (8, True), (40, True), (200, False)])
def test_in_the_tail_a_slow_lane_leaves_the_rest_to_a_fast_one(left: int, waits: bool) -> None:
    slow, fast = states(("gpu", 4, 20.0, False), ("flash", 8, 1.0, True))
    assert faster_ones_do(slow, [slow, fast], left, 0.0) is waits
    assert not faster_ones_do(fast, [slow, fast], left, 0.0)


def test_the_tail_is_left_to_nobody_who_cannot_come() -> None:
    slow, fast = states(("gpu", 4, 20.0, False), ("flash", 8, 1.0, True))
    assert faster_ones_do(slow, [slow, fast], 1, 0.0)
    assert not faster_ones_do(slow, [slow], 1, 0.0)
    fast.out_of_money = True
    assert not faster_ones_do(slow, [slow, fast], 1, 0.0)
    fast.out_of_money = False
    fast.close_for_good(AuthFailed("key"))
    assert not faster_ones_do(slow, [slow, fast], 1, 0.0)


def test_nothing_is_left_to_a_lane_of_unknown_or_like_speed() -> None:
    slow, unknown, alike = states(("gpu", 4, 2.0, False), ("new", 8, None, False), ("flash", 8, 1.5, True))
    assert not faster_ones_do(slow, [slow, unknown, alike], 1, 0.0)
    assert not faster_ones_do(unknown, [slow, unknown, alike], 1, 0.0)


def test_the_free_lanes_make_it_or_they_do_not() -> None:
    lanes = states(("gpu", 4, 2.0, False), ("flash", 8, 1.0, True))  # two tasks a second
    assert free_lanes_make_it(lanes, 1000, since_s=0.0, deadline_s=600.0, now=0.0)
    assert not free_lanes_make_it(lanes, 1100, since_s=0.0, deadline_s=600.0, now=0.0)
    assert not free_lanes_make_it(lanes, 1000, since_s=100.0, deadline_s=600.0, now=0.0)


def test_before_anything_is_known_there_is_a_little_patience() -> None:
    lanes = states(("gpu", 4, None, False))
    assert free_lanes_make_it(lanes, 10**6, since_s=10.0, deadline_s=600.0, now=0.0)
    assert not free_lanes_make_it(lanes, 10**6, since_s=40.0, deadline_s=600.0, now=0.0)


def test_a_free_lane_whose_day_is_over_makes_nothing_before_the_deadline() -> None:
    (gpu,) = states(("gpu", 4, 2.0, False))
    gpu.endpoint.rates.exhaust_day(0.0)
    opens_s = gpu.ready_at(0.0)
    assert not free_lanes_make_it([gpu], 1, since_s=0.0, deadline_s=opens_s - 1, now=0.0)
    assert free_lanes_make_it([gpu], 100, since_s=0.0, deadline_s=opens_s + 100, now=0.0)
    assert not free_lanes_make_it([gpu], 300, since_s=0.0, deadline_s=opens_s + 100, now=0.0)


def test_models_that_take_turns_on_one_server_are_not_left_to_each_other() -> None:
    server = Endpoint("box", slots=4, swaps=True)
    slow, fast = open_endpoints(
        [Lane(name, FakeProvider([]), name, server, typical_s=latency_s) for name, latency_s in (("slow", 20.0), ("fast", 1.0))]
    )
    assert not faster_ones_do(slow, [slow, fast], 1, 0.0)
