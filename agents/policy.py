"""Who should take the next task: rules of time and money, pure functions over what is known of the lanes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from agents.endpoints import EndpointState, LaneState

_CLEARLY_FASTER = 0.5  # of the other lane's latency
_SAFETY = 0.9  # of the time that is left
_NO_IDEA = 0.05  # of the time to the deadline may pass before anything is known of the free lanes


@dataclass(frozen=True)
class Policy:
    """Args:
    deadline_s: from the start of the run; None: none.
    paid: when lanes that cost money take work: when the free ones have no room, or only as far as the deadline needs it.
    hedge_paid: whether a second call for a straggler may go to a paid lane.
    give_up_s: how long no lane may answer before the run is given up.
    """

    deadline_s: float | None = None
    paid: Literal["at_once", "when_late"] = "at_once"
    hedge_paid: bool = False
    give_up_s: float = 12 * 3600.0


AT_ONCE = Policy()


def faster_ones_do(lane: LaneState, others: Iterable[LaneState], left: int, now: float) -> bool:
    """Whether the lanes that are clearly faster finish all that is left before `lane` would finish one task of it."""
    if lane.latency_s is None:
        return False
    horizon_s = _SAFETY * lane.latency_s
    able = 0
    for other in others:
        if other is lane or other.latency_s is None or other.latency_s > _CLEARLY_FASTER * lane.latency_s:
            continue
        if other.endpoint is lane.endpoint and lane.endpoint.turns:
            continue  # it may start nothing before this lane's turn is over
        if other.closed_by or other.out_of_money or other.endpoint.breaker.down:
            continue
        able += _within(other, horizon_s, now)
        if able >= left:
            return True
    return False


def _within(lane: LaneState, horizon_s: float, now: float) -> int:
    """Tasks that a lane can start now or later, and finish within `horizon_s`."""
    assert lane.latency_s is not None
    wait_s = max(0.0, lane.ready_at(now) - now)
    rounds = math.floor((horizon_s - wait_s) / max(lane.latency_s, 1e-6))
    able = max(0, rounds * lane.endpoint.limit - lane.endpoint.in_flight)
    rpm = lane.endpoint.spec.rpm
    return able if rpm is None else min(able, math.ceil(rpm * horizon_s / 60))


def free_lanes_make_it(lanes: Sequence[LaneState], left: int, since_s: float, deadline_s: float, now: float) -> bool:
    """Whether the free lanes finish what is left in time, as far as is known `now`, `since_s` seconds after the start."""
    end = now + deadline_s - since_s
    latencies: dict[EndpointState, list[float]] = {}
    for lane in lanes:
        if lane.lane.paid or lane.closed_by or lane.endpoint.breaker.down or lane.ready_at(now) >= end:
            continue
        if lane.latency_s is None:
            return since_s < _NO_IDEA * deadline_s
        latencies.setdefault(lane.endpoint, []).append(lane.latency_s)
    able = 0.0
    for endpoint, known in latencies.items():
        a_second = endpoint.limit * len(known) / max(sum(known), 1e-6)
        able += a_second * (end - max(now, endpoint.ready_at(now)))
    return left <= _SAFETY * able
