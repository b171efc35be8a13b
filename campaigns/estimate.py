"""What a campaign will take, before it starts: calls, tokens, money, hours and disk, each as a range from low to high.

- The high end of the cost is what is expected at worst; `worst_usd` is what the budget would have to hold for certain.
- Calls go to the lanes of their domain by the lanes' pace, as the scheduler hands them out; paid lanes that wait for the deadline
  get only what the free ones cannot do in time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from campaigns.history import past_calls
from campaigns.outlook import Asked, DomainOutlook, LaneOutlook, Probe, Range, domain_outlook, lane_outlook
from campaigns.spec import CampaignSpec
from campaigns.status import CampaignStatus
from campaigns.store import CampaignFiles
from config.settings import Settings

_CALL_BYTES = 500  # a line of calls.jsonl
_ROW_BYTES = 900  # a row of samples.jsonl or rejected.jsonl without its texts
_BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True)
class Estimate:
    """Money in USD; `cost_usd` is what is still to be spent, never beyond the cap. `worst_usd` None: no paid lane, or no price.

    `uncapped_usd` is what the whole target may cost.
    """

    name: str
    target: int
    accepted: int
    spent_usd: float
    max_usd: float | None
    domains: list[DomainOutlook]
    lanes: list[LaneOutlook]
    calls: Range
    prompt_tokens: Range
    completion_tokens: Range
    cost_usd: Range
    uncapped_usd: Range
    worst_usd: float | None
    hours: Range
    disk_bytes: Range

    @property
    def may_end_early(self) -> bool:
        """Whether the money may run out before the target is met."""
        return self.max_usd is not None and self.uncapped_usd.high > self.max_usd - self.spent_usd


def estimate(settings: Settings, spec: CampaignSpec, folder: Path, probes: Mapping[str, Probe] | None = None) -> Estimate:
    """Look ahead. Relative sources start at `folder`.

    Raises:
        ConfigError: a domain that does not exist, or a price that a cap needs and nobody knows.
        SourceMissing: a domain's files hold no fact.
    """
    past, probed = past_calls(settings, spec), probes or {}
    asked, domains = {}, []
    accepted, spent_usd = _so_far(settings, spec)
    for name in spec.domains:
        outlook, asked[name] = domain_outlook(spec, name, folder, accepted.get(name, 0))
        domains.append(outlook)
    lanes = {
        name: lane_outlook(settings, spec, name, domains, asked, past.get(name), probed.get(name)) for name in spec.lane_names()
    }
    return _sum_up(spec, domains, lanes, asked, spent_usd)


def _so_far(settings: Settings, spec: CampaignSpec) -> tuple[Mapping[str, int], float]:
    """What a campaign of that name has accepted, by domain, and spent."""
    if not CampaignFiles(settings, spec.name).exists():
        return {}, 0.0
    status = CampaignStatus(settings, spec.name)
    return status.accepted, status.cost_usd


def _sum_up(
    spec: CampaignSpec,
    domains: Sequence[DomainOutlook],
    lanes: Mapping[str, LaneOutlook],
    asked: Mapping[str, Asked],
    spent_usd: float,
) -> Estimate:
    low = _Course(spec, domains, lanes, cheap=True)
    high = _Course(spec, domains, lanes, cheap=False)
    max_usd = spec.budget.max_usd
    uncapped = Range(low.usd, max(low.usd, high.usd))
    left = float("inf") if max_usd is None else max(0.0, max_usd - spent_usd)
    worst = [lane.worst_usd for lane in lanes.values() if lane.worst_usd is not None]
    question_bytes = fmean(a.question_bytes for a in asked.values())
    return Estimate(
        name=spec.name,
        target=spec.target,
        accepted=sum(domain.accepted for domain in domains),
        spent_usd=spent_usd,
        max_usd=max_usd,
        domains=list(domains),
        lanes=list(lanes.values()),
        calls=Range(low.calls, high.calls),
        prompt_tokens=Range(low.prompt_tokens, high.prompt_tokens),
        completion_tokens=Range(low.completion_tokens, high.completion_tokens),
        cost_usd=Range(min(uncapped.low, left), min(uncapped.high, left)),
        uncapped_usd=uncapped,
        worst_usd=min(left, high.calls * max(worst)) if worst else None,
        hours=Range(low.seconds / 3600, max(low.seconds, high.seconds) / 3600),
        disk_bytes=Range(low.disk_bytes(question_bytes), high.disk_bytes(question_bytes)),
    )


class _Course:
    """The campaign as it goes if all turns out well (`cheap`), or badly.

    Well: most answers are accepted and short, and the free lanes are fast; what they do costs nothing.
    """

    def __init__(
        self, spec: CampaignSpec, domains: Sequence[DomainOutlook], lanes: Mapping[str, LaneOutlook], *, cheap: bool
    ) -> None:
        self._spec, self._lanes, self._cheap = spec, lanes, cheap
        self._by_lane = dict.fromkeys(lanes, 0.0)
        self.calls = 0.0
        seconds = [0.0]
        for outlook in domains:
            calls = self._calls_of(outlook)
            self.calls += calls
            self._share_out(calls, outlook.lanes)
            seconds.append(calls / max(1e-9, sum(self._any_pace(lanes[name]) for name in outlook.lanes)))
        used = {name for outlook in domains for name in outlook.lanes}
        seconds.append(self.calls / max(1e-9, sum(self._any_pace(lanes[name]) for name in used)))
        self.seconds = max(seconds)

    @property
    def usd(self) -> float:
        return sum(calls * self._pick(lane.usd) for lane, calls in self._spread() if lane.usd is not None)

    @property
    def prompt_tokens(self) -> float:
        return sum(calls * self._pick(lane.prompt_tokens) for lane, calls in self._spread())

    @property
    def completion_tokens(self) -> float:
        return sum(calls * self._pick(lane.completion_tokens) for lane, calls in self._spread())

    def disk_bytes(self, question_bytes: float) -> float:
        return self.calls * (_CALL_BYTES + _ROW_BYTES + question_bytes) + self.completion_tokens * _BYTES_PER_TOKEN

    def _spread(self) -> list[tuple[LaneOutlook, float]]:
        return [(self._lanes[name], calls) for name, calls in self._by_lane.items()]

    def _calls_of(self, outlook: DomainOutlook) -> float:
        accepts = [self._lanes[name].accept for name in outlook.lanes]
        accept = max(rate.high for rate in accepts) if self._cheap else min(rate.low for rate in accepts)
        return max(0, outlook.wanted - outlook.accepted) / accept

    def _share_out(self, calls: float, route: Sequence[str]) -> None:
        """Calls of a domain, to its lanes by their pace; late ones only get what the free ones cannot do by the deadline."""
        free = [name for name in route if self._lanes[name].own]
        paid = [name for name in route if not self._lanes[name].own]
        pace = {name: self._pace_for_cost(self._lanes[name]) for name in route}
        budget = self._spec.budget
        to_paid = calls * sum(pace[name] for name in paid) / sum(pace.values())
        if budget.deadline is not None and budget.paid != "at_once" and free:
            to_paid = max(0.0, calls - budget.deadline * sum(pace[name] for name in free))
        for names, amount in ((paid, to_paid), (free, calls - to_paid)):
            for name in names:
                self._by_lane[name] += amount * pace[name] / sum(pace[other] for other in names)

    def _pace_for_cost(self, lane: LaneOutlook) -> float:
        """Free lanes at their best and paid ones at their worst make the campaign cheap, and the other way round."""
        return max(1e-9, lane.pace.high if lane.own == self._cheap else lane.pace.low)

    def _any_pace(self, lane: LaneOutlook) -> float:
        return lane.pace.high if self._cheap else lane.pace.low

    def _pick(self, value: Range) -> float:
        return value.low if self._cheap else value.high
