"""What a spec says of limits: which lanes share a bottleneck, how tight it is, when paid lanes take work. No server is asked."""

from collections.abc import Sequence

from agents.lanes import Endpoint
from agents.policy import Policy
from campaigns.outlook import BATCH_SLOTS, where
from campaigns.spec import CampaignSpec, LaneSpec


def policy_of(spec: CampaignSpec) -> Policy:
    """The rules of time and money that a spec asks for."""
    budget = spec.budget
    paid = budget.paid or ("at_once" if budget.deadline is None else "when_late")
    return Policy(deadline_s=budget.deadline, paid=paid, hedge_paid=budget.hedge_paid)


def endpoints_of(spec: CampaignSpec) -> dict[str, Endpoint]:
    """By lane. Lanes at one bottleneck share an endpoint: a server that queues, or a vendor's quota for one model."""
    users: dict[tuple[str, bool], dict[str, LaneSpec]] = {}
    for name, (key, model) in spec.lane_names().items():
        lane = spec.lanes[key]
        queues = lane.provider == "ollama" or lane.own_machine(model)
        users.setdefault((_bottleneck(lane, model, queues), queues), {})[name] = lane
    return {
        name: _endpoint(shown, list(lanes.values()), queues=queues) for (shown, queues), lanes in users.items() for name in lanes
    }


def _bottleneck(lane: LaneSpec, model: str, queues: bool) -> str:
    if queues:
        return where(lane)
    return " ".join(word for word in (where(lane), model, lane.api_key_env, "batch" * (lane.mode == "batch")) if word)


def _endpoint(key: str, lanes: Sequence[LaneSpec], *, queues: bool) -> Endpoint:
    """With the tightest of the limits that its lanes name."""

    def tightest(limit: str) -> int | None:
        return min((value for lane in lanes if (value := getattr(lane, limit)) is not None), default=None)

    slots = tightest("slots") or (BATCH_SLOTS if lanes[0].mode == "batch" else None)
    return Endpoint(key, queues=queues, swaps=queues, slots=slots, rpm=tightest("rpm"), tpm=tightest("tpm"), rpd=tightest("rpd"))
