"""What a spec would do: the real plan and the real scheduler on a clock that does not wait, with servers that are only described.

- Nothing is asked of any server and nothing is written. The same seed gives the same run.
- What differs from a real run is what the description leaves out: no answer is judged (a share of them is accepted at random),
  and storing takes no time.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from agents import tokens
from agents.budget import Budget
from agents.lanes import Endpoint, GpuThresholds, Lane, LaneEvent, LaneView
from agents.prices import Price
from agents.scheduler import Scheduler
from agents.simulated import Seen, SimulatedServer
from agents.task import Outcome
from agents.virtual_time import run_virtual
from campaigns.described import Assumed, LaneDescription, assume
from campaigns.domains.registry import domain
from campaigns.endpoints import endpoints_of, policy_of
from campaigns.history import past_calls
from campaigns.outlook import known_price
from campaigns.plan import Plan
from campaigns.spec import CampaignSpec, source_files
from config.errors import HafsError
from config.settings import Settings

MOST_EVENTS = 200  # kept of what the scheduler tells


@dataclass(frozen=True)
class SimulatedLane:
    """`calls` had an outcome, of which `accepted` were samples; `idle_s` in seconds by reason."""

    name: str
    model: str
    paid: bool
    calls: int
    accepted: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    latency_s: float | None
    idle_s: Mapping[str, float]


@dataclass(frozen=True)
class Simulation:
    """How it went. `end`: done, budget, exhausted or failed; times in seconds, money in USD.

    `servers` are what each server saw; `events` what the scheduler told, with its time; `left` samples are still owed.
    """

    name: str
    end: str
    message: str
    seconds: float
    target: int
    accepted: int
    rejected: int
    failed: int
    cost_usd: float
    max_usd: float | None
    lanes: list[SimulatedLane]
    servers: Mapping[str, Seen]
    assumed: list[Assumed]
    events: list[tuple[float, LaneEvent]]
    milestones: Mapping[int, float]  # percent of the target -> when it was met

    @property
    def left(self) -> int:
        return self.target - self.accepted


@dataclass
class _Counts:
    accepted: Counter[str] = field(default_factory=Counter)  # by lane
    ended: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    failed: int = 0
    events: list[tuple[float, LaneEvent]] = field(default_factory=list)
    milestones: dict[int, float] = field(default_factory=dict)


def simulate(
    settings: Settings, spec: CampaignSpec, folder: Path, said: Mapping[str, LaneDescription] | None = None, seed: int = 0
) -> Simulation:
    """Run a campaign, from its beginning, in no time.

    Relative sources start at `folder`; `said` describes lanes (campaigns.described).

    Raises:
        ConfigError: a domain that does not exist, or a price that a cap needs and nobody knows.
        SourceMissing: a domain's files hold no fact.
    """
    assumed = assume(spec, said or {}, past_calls(settings, spec))
    lanes, servers = _lanes(settings, spec, assumed, seed)
    sources = {name: source_files(spec, name, folder) for name in spec.domains}
    plan = Plan(spec, [domain(name) for name in spec.domains], sources)
    return run_virtual(_Run(spec, plan, lanes, servers, assumed, seed).run)


class _Run:
    def __init__(
        self,
        spec: CampaignSpec,
        plan: Plan,
        lanes: list[Lane],
        servers: Mapping[str, SimulatedServer],
        assumed: Mapping[str, Assumed],
        seed: int,
    ) -> None:
        self._spec, self._plan, self._lanes, self._servers, self._assumed = spec, plan, lanes, servers, assumed
        self._random = random.Random(f"{seed} verdicts")
        self._counts = _Counts()

    async def run(self) -> Simulation:
        budget = Budget(self._spec.budget.max_usd)
        routes = {name: self._spec.route(name) for name in self._spec.domains}
        scheduler = Scheduler(self._lanes, routes, budget, policy_of(self._spec), on_event=self._note)
        reason: str
        try:
            end = await scheduler.run(self._plan, self._ended)
            short = end.reason == "done" and self._plan.accepted < self._spec.target
            reason, message = "exhausted" if short else end.reason, end.message
        except HafsError as error:
            reason, message = "failed", str(error)
        return self._result(reason, message, anyio.current_time(), budget, scheduler.views())

    async def _ended(self, outcome: Outcome) -> None:
        whole = outcome.completion is not None and outcome.completion.finish_reason == "stop"
        accepted = whole and self._random.random() < self._assumed[outcome.lane].accept
        self._counts.ended[outcome.lane] += 1
        self._counts.accepted[outcome.lane] += accepted
        self._counts.failed += outcome.completion is None
        self._counts.rejected += outcome.completion is not None and not accepted
        self._plan.ended(outcome, accepted)
        percent = 100 * self._counts.accepted.total() // self._spec.target
        for mark in (25, 50, 75, 100):
            if percent >= mark:
                self._counts.milestones.setdefault(mark, anyio.current_time())

    def _note(self, event: LaneEvent) -> None:
        if len(self._counts.events) < MOST_EVENTS:
            self._counts.events.append((anyio.current_time(), event))

    def _result(self, end: str, message: str, seconds: float, budget: Budget, views: list[LaneView]) -> Simulation:
        counts = self._counts
        return Simulation(
            name=self._spec.name,
            end=end,
            message=message,
            seconds=seconds,
            target=self._spec.target,
            accepted=counts.accepted.total(),
            rejected=counts.rejected,
            failed=counts.failed,
            cost_usd=budget.spent_usd,
            max_usd=self._spec.budget.max_usd,
            lanes=[self._lane(view) for view in views],
            servers={key: server.seen for key, server in self._servers.items()},
            assumed=list(self._assumed.values()),
            events=counts.events,
            milestones=counts.milestones,
        )

    def _lane(self, view: LaneView) -> SimulatedLane:
        return SimulatedLane(
            name=view.name,
            model=view.model,
            paid=view.paid,
            calls=self._counts.ended[view.name],
            accepted=self._counts.accepted[view.name],
            failed=view.failed,
            prompt_tokens=view.prompt_tokens,
            completion_tokens=view.completion_tokens,
            cost_usd=view.cost_usd,
            latency_s=view.latency_s,
            idle_s=view.idle_s,
        )


# lanes -----------------------------------------------------------------------------------------------------------------


def _lanes(
    settings: Settings, spec: CampaignSpec, assumed: Mapping[str, Assumed], seed: int
) -> tuple[list[Lane], dict[str, SimulatedServer]]:
    """Lanes over described servers, and the servers by the endpoint's key. What a server as a whole does (slots, limits, outages,
    load) is what its first lane says.
    """
    endpoints = endpoints_of(spec)
    prices = {name: _price(settings, spec, name) for name in endpoints}
    servers = {}
    for key in {endpoint.key: None for endpoint in endpoints.values()}:
        users = [name for name, endpoint in endpoints.items() if endpoint.key == key]
        models = {name: spec.lane_names()[name][1] for name in users}
        servers[key] = SimulatedServer(
            assumed[users[0]].behaviour,
            name=key,
            seed=seed,
            prices={models[name]: price for name in users if (price := prices[name]) is not None},
            by_model={models[name]: assumed[name].behaviour for name in users},
        )
    return [_lane(spec, name, endpoint, servers[endpoint.key], prices[name]) for name, endpoint in endpoints.items()], servers


def _lane(spec: CampaignSpec, name: str, endpoint: Endpoint, server: SimulatedServer, price: Price | None) -> Lane:
    key, model = spec.lane_names()[name]
    lane = spec.lanes[key]
    if lane.gpu is not None:
        endpoint = replace(endpoint, gpu=GpuThresholds(lane.gpu.low, lane.gpu.high, server))
    return Lane(
        name=name,
        provider=server,
        model=model,
        endpoint=endpoint,
        timeout_s=lane.batch_patience if lane.mode == "batch" else lane.timeout,
        price=price,
        own=lane.own_machine(model),
        typical_s=server.behaviour.latency_s if lane.mode == "batch" else None,
        thinking_tokens=tokens.thinking_at_most(lane.provider, model, lane.thinking_budget),
    )


def _price(settings: Settings, spec: CampaignSpec, name: str) -> Price | None:
    key, model = spec.lane_names()[name]
    return None if spec.lanes[key].own_machine(model) else known_price(settings, spec, name)
