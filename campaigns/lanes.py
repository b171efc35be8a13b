"""From the lanes of a spec to lanes that work: servers found or started, models present, prices known."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from anyio import to_thread

from agents.lanes import Lane
from agents.prices import price_of
from agents.providers.base import Provider
from agents.providers.gemini import GeminiProvider
from agents.providers.ollama import OllamaProvider
from campaigns.serving import model_server
from campaigns.spec import AUTO, CampaignSpec, LaneSpec
from config.errors import BadRequest, ConfigError, ProviderUnavailable
from config.settings import LOCAL, Settings

log = logging.getLogger("hafs.campaign")


@asynccontextmanager
async def open_lanes(settings: Settings, spec: CampaignSpec) -> AsyncIterator[dict[str, Lane]]:
    """The lanes of a spec by name. A server that is down is logged and left to the scheduler while another lane works.

    Raises:
        ProviderUnavailable: no lane's server can be reached.
        BadRequest: a server lacks its lane's model.
    """
    async with AsyncExitStack() as stack:
        lanes: dict[str, Lane] = {}
        for name, lane in spec.lanes.items():
            provider = await _provider(settings, name, lane)
            stack.push_async_callback(provider.aclose)
            lanes[name] = _lane(name, lane, provider)
        await _check(spec, lanes)
        yield lanes


async def _provider(settings: Settings, name: str, lane: LaneSpec) -> Provider:
    if lane.provider == "gemini":
        return GeminiProvider(base_url=lane.base_url, thinking_budget=lane.thinking_budget)
    if lane.host == AUTO:
        return OllamaProvider(await to_thread.run_sync(_auto_host, settings, lane))
    if not lane.host:
        raise ConfigError(f"lanes.{name}: an Ollama lane needs a host", hint=f'host = "http://127.0.0.1:11434", or "{AUTO}"')
    return OllamaProvider(lane.host)


def _auto_host(settings: Settings, lane: LaneSpec) -> str:
    """The model server of this machine, started if need be, with the lane's model registered."""
    with model_server(settings, LOCAL, model=lane.model, gguf=lane.gguf) as server:
        return server.url


def _lane(name: str, lane: LaneSpec, provider: Provider) -> Lane:
    return Lane(name, provider, lane.model, lane.slots, lane.timeout, lane.rpm, price_of(lane.provider, lane.model))


async def _check(spec: CampaignSpec, lanes: dict[str, Lane]) -> None:
    down: list[ProviderUnavailable] = []
    for name, lane in lanes.items():
        if spec.lanes[name].provider != "ollama":
            continue
        try:
            models = await lane.provider.models()
        except ProviderUnavailable as error:
            log.warning("lane=%s down: %s", name, error)
            down.append(error)
            continue
        if lane.model not in models and f"{lane.model}:latest" not in models:
            raise BadRequest(
                f'lanes.{name}: {spec.lanes[name].host} has no model "{lane.model}"',
                hint=f"on that machine run: ollama pull {lane.model}   (it has: {', '.join(sorted(models)) or 'none'})",
            )
    if len(down) == len(lanes):
        raise down[0]
