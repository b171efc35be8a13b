"""From the lanes of a spec to lanes that work: servers found or started, models present, prices known, limits shared.

Lanes that share a bottleneck share an endpoint: an Ollama server by its URL, a Gemini model by its key. The folder below
HAFS_HOME/limits in which processes find each other is named by a hash: no key and no address stands in it.
"""

import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from anyio import to_thread

from agents import tokens
from agents.gpu import LatencyTelemetry
from agents.lanes import Endpoint, GpuThresholds, Lane
from agents.prices import PRICES_FILE, Price, price_of, unknown_price
from agents.providers.base import Provider
from agents.providers.ollama import KEY_VARIABLE, OllamaProvider
from campaigns.endpoints import endpoints_of
from campaigns.outlook import BATCH_SLOTS, where
from campaigns.serving import model_server, server_of
from campaigns.spec import AUTO, CampaignSpec, LaneSpec
from campaigns.sync.remote import Nodes
from campaigns.telemetry import open_telemetry
from config.errors import AuthFailed, ModelMissing, ProviderUnavailable
from config.settings import LOCAL, Settings

log = logging.getLogger("hafs.campaign")

GEMINI_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
BATCH_TYPICAL_S = 3600.0

T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """A model that its lane's server does not have. `has`: the models it has."""

    lane: str
    model: str
    host: str
    provider: Provider
    has: list[str]

    def error(self) -> ModelMissing:
        return ModelMissing(
            f'lanes.{self.lane}: {self.host} has no model "{self.model}"',
            hint=f"fetch it with: hafs campaign check FILE --pull   (it has: {', '.join(sorted(self.has)) or 'none'})",
        )


@asynccontextmanager
async def open_lanes(settings: Settings, spec: CampaignSpec) -> AsyncIterator[dict[str, Lane]]:
    """The lanes of a spec by name, their servers asked for nothing yet.

    Raises:
        AuthFailed: a key is not there.
        ConfigError: a price is not known under a budget, or a node does not exist.
    """
    async with AsyncExitStack() as stack:
        lanes: dict[str, Lane] = {}
        endpoints, nodes = endpoints_of(spec), Nodes(settings)
        stack.push_async_callback(to_thread.run_sync, nodes.close)
        for key, lane in spec.lanes.items():
            opened = await _Opening(settings, spec, nodes, key, lane).open(stack, endpoints)
            lanes.update({found.name: found for found in opened})
        yield lanes


async def check_lanes(spec: CampaignSpec, lanes: dict[str, Lane]) -> list[Missing]:
    """Models that their servers lack. A server that is down is logged and left to the scheduler while another lane works.

    Raises:
        ProviderUnavailable: no lane's server can be reached.
        AuthFailed: a server refuses the key.
    """
    missing, down = [], []
    listings: dict[int, list[str]] = {}
    for name, (key, model) in spec.lane_names().items():
        provider = lanes[name].provider
        if spec.lanes[key].provider == "gemini":
            continue  # it lists models by pages, and answers 404 at once where one does not exist
        try:
            if id(provider) not in listings:
                listings[id(provider)] = await provider.models()
        except ProviderUnavailable as error:
            log.warning("lane %s down: %s", name, error)
            down.append(error)
            continue
        has = listings[id(provider)]
        if model not in has and f"{model}:latest" not in has:
            missing.append(Missing(name, model, where(spec.lanes[key]), provider, has))
    if len(down) == len(lanes):
        raise down[0]
    return missing


class _Opening:
    """The opening of one lane of a spec: one provider, one lane for each of its models."""

    def __init__(self, settings: Settings, spec: CampaignSpec, nodes: Nodes, key: str, lane: LaneSpec) -> None:
        self._settings, self._spec, self._nodes, self._key, self._lane = settings, spec, nodes, key, lane

    async def open(self, stack: AsyncExitStack, endpoints: Mapping[str, Endpoint]) -> list[Lane]:
        provider, identity = await self._provider(stack)
        stack.push_async_callback(provider.aclose)
        gpu = await self._gpu(stack)
        names = {model: name for name, (key, model) in self._spec.lane_names().items() if key == self._key}
        return [
            Lane(
                name=name,
                provider=provider,
                model=model,
                endpoint=self._endpoint(endpoints[name], identity, gpu),
                timeout_s=self._lane.batch_patience * 1.1 if self._lane.mode == "batch" else self._lane.timeout,
                price=self._price(model),
                own=self._lane.own_machine(model),
                typical_s=BATCH_TYPICAL_S if self._lane.mode == "batch" else None,
                keeps=self._lane.mode == "batch",
                thinking_tokens=tokens.thinking_at_most(self._lane.provider, model, self._lane.thinking_budget),
            )
            for model, name in names.items()
        ]

    async def _provider(self, stack: AsyncExitStack) -> tuple[Provider, str]:
        """The provider, and what names its server among limits (hashed before it is written anywhere)."""
        match self._lane.provider:
            case "gemini":
                return self._gemini()
            case "openai":
                return self._openai()
        host = self._lane.host
        if self._lane.node:
            others = any(lane.node != self._lane.node for lane in self._spec.lanes.values())
            host = (await _held(stack, server_of(self._nodes.get(self._lane.node), patient=others))).url
        elif host == AUTO:
            host = await to_thread.run_sync(self._auto_host)
        provider = OllamaProvider(host, idle_timeout_s=self._lane.idle_timeout, api_key=self._settings.key(KEY_VARIABLE))
        return provider, f"node {self._lane.node}" if self._lane.node else host

    def _auto_host(self) -> str:
        """The model server of this machine, started if need be, with the lane's model registered."""
        with model_server(self._settings, LOCAL, model=self._lane.model, gguf=self._lane.gguf) as server:
            return server.url

    def _gemini(self) -> tuple[Provider, str]:
        from agents.providers.gemini import GeminiProvider

        key = next((found for name in GEMINI_KEYS if (found := self._settings.key(name))), "")
        if not key:
            raise AuthFailed(
                f"lanes.{self._key}: no key for Gemini: {' or '.join(GEMINI_KEYS)} is not set",
                hint="get a key at https://aistudio.google.com/apikey and export GEMINI_API_KEY=…, or let hafs init keep it",
            )
        lane = self._lane
        if lane.mode == "batch":
            from agents.providers.gemini_batch import BatchProvider
            from agents.providers.gemini_jobs import BatchJobs

            jobs = BatchJobs(base_url=lane.base_url, thinking_budget=lane.thinking_budget, api_key=key)
            journal = self._settings.training / self._spec.name / "batches" / self._key
            return BatchProvider(jobs, journal, patience_s=lane.batch_patience, most=lane.slots or BATCH_SLOTS), f"batch {key}"
        provider = GeminiProvider(
            base_url=lane.base_url, thinking_budget=lane.thinking_budget, idle_timeout_s=lane.idle_timeout, api_key=key
        )
        return provider, f"{lane.base_url} {key}"

    def _openai(self) -> tuple[Provider, str]:
        from agents.providers.openai_compatible import OpenAIProvider

        lane = self._lane
        name = lane.key_name
        key = self._settings.key(name)
        if name and not key:
            hint = f"export {name}=…, or name another variable with api_key_env"
            raise AuthFailed(f"lanes.{self._key}: no key: {name} is not set", hint=hint)
        if not name and not lane.own_machine(lane.all_models[0]):
            hint = 'name the variable that holds its key: api_key_env = "…"; if the server is your own and wants none: own = true'
            raise AuthFailed(f"lanes.{self._key}: no key for {lane.base_url}", hint=hint)
        return OpenAIProvider(lane.base_url, api_key=key, idle_timeout_s=lane.idle_timeout), f"{lane.base_url} {key}"

    def _endpoint(self, endpoint: Endpoint, identity: str, gpu: GpuThresholds | None) -> Endpoint:
        """`identity` may hold a key: only a hash of it is written anywhere."""
        model = "" if endpoint.queues else endpoint.key
        name = hashlib.sha256(f"{self._lane.provider} {identity} {model}".encode()).hexdigest()[:16]
        return replace(endpoint, gpu=gpu, shared=self._settings.home / "limits" / name)

    def _price(self, model: str) -> Price | None:
        lane, file = self._lane, self._settings.home / PRICES_FILE
        if lane.own_machine(model):
            return None
        price = price_of(lane.provider, model, base_url=lane.base_url, batch=lane.mode == "batch", file=file)
        if price is None and self._spec.budget.max_usd is not None:
            raise unknown_price(self._key, lane.provider, model, base_url=lane.base_url, file=file)
        return price

    async def _gpu(self, stack: AsyncExitStack) -> GpuThresholds | None:
        wanted = self._lane.gpu
        if wanted is None:
            return None
        kind = wanted.telemetry or self._lane.node or LOCAL
        telemetry = (
            LatencyTelemetry() if kind == "latency" else await stack.enter_async_context(open_telemetry(self._nodes, kind))
        )
        return GpuThresholds(wanted.low, wanted.high, LatencyTelemetry(telemetry))


async def _held(stack: AsyncExitStack, manager: AbstractContextManager[T]) -> T:
    """Enter a context manager that waits for the network in a thread, and leave it there too."""
    entered = await to_thread.run_sync(manager.__enter__)
    stack.push_async_callback(to_thread.run_sync, manager.__exit__, None, None, None)
    return entered
