"""One request to every lane of a campaign: whether it answers, how fast, and what that cost. Nothing is kept of it.

What is private is asked of the user's own machines only, and the budget's limit holds for the probe, too.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import anyio

from agents.budget import Budget
from agents.lanes import Lane
from agents.providers.ollama import OllamaProvider
from agents.task import Usage
from campaigns.lanes import Missing, check_lanes, open_lanes
from campaigns.outlook import Probe, prompts_of
from campaigns.spec import CampaignSpec, source_files
from config.contracts.sample import Message
from config.errors import BudgetExceeded, ProviderError, ProviderUnavailable
from config.settings import Settings

ShowPull = Callable[[Missing], AbstractContextManager[Callable[[int, int], None]]]


async def probe_lanes(settings: Settings, spec: CampaignSpec, folder: Path) -> list[Probe]:
    """Ask every lane once. What goes wrong is in the probe of its lane.

    Raises:
        ConfigError, AuthFailed: the lanes cannot be opened.
    """
    budget = Budget(spec.budget.max_usd)
    probes: list[Probe] = []
    async with open_lanes(settings, spec) as lanes:
        missing = {lack.lane: lack for lack in await _missing(spec, lanes)}

        async def in_turn(names: Sequence[str]) -> None:
            for name in names:
                probe = await _probe(spec, folder, lanes[name], missing.get(name), budget)
                probes.append(probe)

        async with anyio.create_task_group() as group:
            for endpoint in {lane.endpoint.key: None for lane in lanes.values()}:
                group.start_soon(in_turn, [name for name, lane in lanes.items() if lane.endpoint.key == endpoint])
    order = list(spec.lane_names())
    return sorted(probes, key=lambda probe: order.index(probe.lane))


async def pull_models(settings: Settings, spec: CampaignSpec, show: ShowPull) -> list[str]:
    """Fetch what the lanes' Ollama servers lack; returns the names of the lanes. `show` gets bytes done and bytes in all.

    Raises:
        ModelMissing: a model that cannot be fetched.
        ProviderUnavailable: a server, or its way to the registry, failed.
    """
    pulled = []
    async with open_lanes(settings, spec) as lanes:
        for lack in await check_lanes(spec, lanes):
            if not isinstance(lack.provider, OllamaProvider):
                raise lack.error()
            with show(lack) as progress:
                async for step in lack.provider.pull(lack.model):
                    progress(step.done_bytes, step.total_bytes)
            pulled.append(lack.lane)
    return pulled


async def _missing(spec: CampaignSpec, lanes: dict[str, Lane]) -> Iterable[Missing]:
    try:
        return await check_lanes(spec, lanes)
    except ProviderUnavailable:
        return []  # no server answers: each lane's own request will say so


async def _probe(spec: CampaignSpec, folder: Path, lane: Lane, missing: Missing | None, budget: Budget) -> Probe:
    key, _ = spec.lane_names()[lane.name]
    if missing is not None:
        return Probe(lane.name, error=str(missing.error()), missing=True)
    if spec.lanes[key].mode == "batch":
        return Probe(lane.name, error="not asked: a batch may take hours")
    served = next((domain for domain in spec.domains if lane.name in spec.route(domain)), None)
    if served is None:
        return Probe(lane.name, error="not asked: no domain is routed to it")
    [prompt] = prompts_of(served, source_files(spec, served, folder), most=1)
    try:
        return await _ask(spec, lane, prompt, budget)
    except (ProviderError, BudgetExceeded) as error:
        return Probe(lane.name, error=str(error))
    except TimeoutError:
        return Probe(lane.name, error=f"no answer in {lane.timeout_s:g} s")


async def _ask(spec: CampaignSpec, lane: Lane, prompt: list[Message], budget: Budget) -> Probe:
    sampling = spec.sampling.sampling(0)
    held = budget.reserve(lane.price, prompt, sampling, lane.thinking_tokens) if lane.paid else None
    usage: Usage | None = None
    started = perf_counter()
    try:
        with anyio.fail_after(lane.timeout_s):
            completion = await lane.provider.generate(lane.model, prompt, sampling)
        usage = completion.usage
    finally:
        cost = budget.settle(held, usage) if held is not None else None
    probe = Probe(lane.name, latency_s=perf_counter() - started, usage=usage)
    return probe if cost is None else replace(probe, cost_usd=cost.usd)
