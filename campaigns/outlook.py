"""What is expected of each domain and each lane of a campaign, before it starts.

- Nothing is asked of any server here. What a lane does is taken from a probe of it, else from its history, else guessed widely;
  every lane says which.
- Prompt tokens are those of real prompts of the domain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from agents import tokens
from agents.budget import worst_case
from agents.prices import PRICES_FILE, Price, price_of, unknown_price
from agents.task import Usage
from campaigns.domains.registry import domain
from campaigns.evaluation.statistics import wilson
from campaigns.history import Past
from campaigns.spec import CampaignSpec, LaneSpec, source_files
from config.contracts.sample import Message
from config.errors import SourceMissing
from config.settings import Settings

SAMPLED_PROMPTS = 50  # of each domain
_GUESS = 0.4  # how far a guess of prompt tokens may be off
_PROBED = 0.5  # how far another call may be from the one of a probe
_KNOWN = 0.1  # … and from the mean of many


@dataclass(frozen=True)
class Range:
    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)


# What is taken of a lane that has never answered.
_OWN_TOKENS_PER_S = Range(15, 120)  # of one request, on a GPU of one's own
_HOSTED_TOKENS_PER_S = Range(50, 300)
_HOSTED_FIRST_S = Range(0.3, 1.5)  # until a hosted model begins to answer
_OWN_SLOTS = Range(1, 4)  # where the spec does not say and nothing was measured
_HOSTED_SLOTS = Range(16, 128)
_ACCEPT = Range(0.5, 1.0)
_BATCH_S = 600.0  # a batch is never faster
BATCH_SLOTS = 1_000  # requests of one batch

Basis = Literal["probe", "history", "guess"]


@dataclass(frozen=True)
class Probe:
    """One request to a lane. `error` empty: it was answered. `missing`: its server does not have the model."""

    lane: str
    latency_s: float = 0.0
    usage: Usage = Usage()
    cost_usd: float = 0.0
    error: str = ""
    missing: bool = False

    @property
    def tokens_per_s(self) -> float:
        made = self.usage.completion_tokens + self.usage.thinking_tokens
        return made / self.latency_s if self.latency_s else 0.0


@dataclass(frozen=True)
class LaneOutlook:
    """What is expected of one call of a lane. `usd` and `worst_usd` None: it is free, or nobody knows (`price_unknown`).

    `pace` is in answers a second. `where` says who answers: a host, or whose service.
    """

    name: str
    model: str
    provider: str
    where: str
    own: bool
    basis: Basis
    past_calls: int
    slots: Range
    latency_s: Range
    prompt_tokens: Range
    completion_tokens: Range
    accept: Range
    pace: Range
    usd: Range | None
    worst_usd: float | None
    price_unknown: bool = False


@dataclass(frozen=True)
class DomainOutlook:
    """`wanted` samples, of which `accepted` are there. `leaves_to`: who, of those who are no machine of the user's, is asked."""

    name: str
    wanted: int
    accepted: int
    private: bool
    files: int
    cells: int
    lanes: list[str]
    leaves_to: list[str]


@dataclass(frozen=True)
class Asked:
    """What is known of a domain's prompts from a sample of them."""

    likely_tokens: float
    most_usd_of: list[Message]  # the longest prompt
    question_bytes: float


def domain_outlook(spec: CampaignSpec, name: str, folder: Path, accepted: int) -> tuple[DomainOutlook, Asked]:
    files = source_files(spec, name, folder)
    prompts = prompts_of(name, files)
    route, lanes = spec.route(name), spec.lane_names()
    away = [lane for lane in route if not spec.lanes[lanes[lane][0]].own_machine(lanes[lane][1])]
    outlook = DomainOutlook(
        name=name,
        wanted=round(spec.target * spec.domains[name].share / sum(share.share for share in spec.domains.values())),
        accepted=accepted,
        private=spec.private(name),
        files=len(files),
        cells=len(domain(name).cells(files)),
        lanes=route,
        leaves_to=[f"{where(spec.lanes[lanes[lane][0]])} (lane {lane})" for lane in away],
    )
    likely = fmean(tokens.likely(prompt) for prompt in prompts)
    longest = max(prompts, key=tokens.at_most)
    return outlook, Asked(likely, longest, fmean(len(prompt[-1].content.encode()) for prompt in prompts))


def where(lane: LaneSpec) -> str:
    """Who answers on a lane, as a person would say it."""
    if lane.provider == "gemini":
        return lane.base_url or "Google Gemini"
    return lane.base_url or lane.host or f"node {lane.node}"


def lane_outlook(
    settings: Settings,
    spec: CampaignSpec,
    name: str,
    domains: Sequence[DomainOutlook],
    asked: Mapping[str, Asked],
    past: Past | None,
    probe: Probe | None,
) -> LaneOutlook:
    key, model = spec.lane_names()[name]
    lane = spec.lanes[key]
    own = lane.own_machine(model)
    served = [asked[domain.name] for domain in domains if name in domain.lanes] or list(asked.values())
    if probe is not None and probe.error:
        probe = None
    prompt, completion, latency = _call(lane, own, spec.sampling.max_tokens, served, past, probe)
    price = None if own else known_price(settings, spec, name)
    thinking = tokens.thinking_at_most(lane.provider, model, lane.thinking_budget)
    sampling = spec.sampling.sampling(0)
    slots = _slots(lane, own, sum(other == key for other, _ in spec.lane_names().values()))
    return LaneOutlook(
        name=name,
        model=model,
        provider=lane.provider,
        where=where(lane),
        own=own,
        basis="probe" if probe else "history" if past else "guess",
        past_calls=past.answered if past else 0,
        slots=slots,
        latency_s=latency,
        prompt_tokens=prompt,
        completion_tokens=completion,
        accept=_accept(past),
        pace=_pace(lane, slots, latency, prompt + completion),
        usd=None if price is None else _usd(price, prompt, completion),
        worst_usd=None if price is None else max(worst_case(price, a.most_usd_of, sampling, thinking) for a in served),
        price_unknown=not own and price is None,
    )


def known_price(settings: Settings, spec: CampaignSpec, name: str) -> Price | None:
    """What a lane's model costs. Raises ConfigError where nobody knows and a cap needs it."""
    key, model = spec.lane_names()[name]
    lane, file = spec.lanes[key], settings.home / PRICES_FILE
    price = price_of(lane.provider, model, base_url=lane.base_url, batch=lane.mode == "batch", file=file)
    if price is None and spec.budget.max_usd is not None:
        raise unknown_price(name, lane.provider, model, base_url=lane.base_url, file=file)
    return price


def _call(
    lane: LaneSpec, own: bool, max_tokens: int, served: Sequence[Asked], past: Past | None, probe: Probe | None
) -> tuple[Range, Range, Range]:
    """Prompt tokens, completion tokens and seconds of one call."""
    likely = fmean(asked.likely_tokens for asked in served)
    if probe is not None:
        made = probe.usage.completion_tokens + probe.usage.thinking_tokens
        completion = Range(max(1.0, made * (1 - _PROBED)), max(1.0, min(made * (1 + _PROBED), max_tokens)))
        return _around(probe.usage.prompt_tokens, _KNOWN), completion, _around(probe.latency_s, _PROBED)
    if past is not None:
        return _mean(past.prompt_tokens), _mean(past.completion_tokens), _mean(past.latency_s)
    completion = Range(min(16.0, max_tokens), float(max_tokens))
    if lane.mode == "batch":
        return _around(likely, _GUESS), completion, Range(_BATCH_S, max(_BATCH_S, lane.batch_patience))
    speed, first = (_OWN_TOKENS_PER_S, Range(0.05, 1.0)) if own else (_HOSTED_TOKENS_PER_S, _HOSTED_FIRST_S)
    seconds = Range(first.low + completion.low / speed.high, first.high + completion.high / speed.low)
    return _around(likely, _GUESS), completion, seconds


def _slots(lane: LaneSpec, own: bool, sharing: int) -> Range:
    """Calls at once on one of `sharing` models of a lane."""
    if lane.mode == "batch":
        return Range(BATCH_SLOTS, BATCH_SLOTS)
    slots = Range(lane.slots, lane.slots) if lane.slots else _OWN_SLOTS if own else _HOSTED_SLOTS
    share = sharing if lane.provider == "ollama" else 1  # models of one Ollama server share its slots
    return Range(slots.low / share, slots.high / share)


def _pace(lane: LaneSpec, slots: Range, latency: Range, call_tokens: Range) -> Range:
    """Answers a second: what the slots allow, within the limits of a minute and a day."""
    low, high = slots.low / max(latency.high, 1e-3), slots.high / max(latency.low, 1e-3)
    for limit, per_s in ((lane.rpm, 60.0), (lane.rpd, 86400.0)):
        if limit:
            low, high = min(low, limit / per_s), min(high, limit / per_s)
    if lane.tpm:
        low, high = min(low, lane.tpm / 60 / call_tokens.high), min(high, lane.tpm / 60 / call_tokens.low)
    return Range(low, high)


def _accept(past: Past | None) -> Range:
    if past is None:
        return _ACCEPT
    interval = wilson(past.accepted, past.answered)
    return Range(max(0.01, interval.low), max(0.01, interval.high))


def _usd(price: Price, prompt: Range, completion: Range) -> Range:
    low, high = Usage(round(prompt.low), round(completion.low)), Usage(round(prompt.high), round(completion.high))
    return Range(price.cost(low), price.cost(high))


def _mean(values: Sequence[float]) -> Range:
    """The mean of what is to come: two standard errors to each side, and never narrower than a tenth."""
    middle = fmean(values)
    error = 2 * stdev(values) / sqrt(len(values)) if len(values) > 1 else middle
    slack = max(error, _KNOWN * middle)
    return Range(max(0.0, middle - slack), middle + slack)


def _around(value: float, part: float) -> Range:
    return Range(value * (1 - part), value * (1 + part))


def prompts_of(name: str, files: Sequence[Path], most: int = SAMPLED_PROMPTS) -> list[list[Message]]:
    """Real prompts of a domain, from cells all over it.

    Raises:
        ConfigError: there is no such domain.
        SourceMissing: the files hold no fact of it.
    """
    made = domain(name)
    cells = made.cells(files)
    if not cells:
        raise SourceMissing(
            f"sources.{name}: no {name} fact in {len(files)} files",
            hint="check that the pattern names the right files, or leave the line out to use the shipped corpus",
        )
    chosen = cells[:: max(1, len(cells) // most)][:most]
    return [made.prompt(item) for cell in chosen if (item := made.item(cell, 0, files)) is not None]
