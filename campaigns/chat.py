"""Talk to a model: one answer, or a conversation with its history."""

from collections.abc import Callable, Sequence

import anyio

from agents.providers.base import Provider
from agents.providers.ollama import OllamaProvider
from agents.task import Sampling
from config.contracts.sample import Message
from config.errors import BadRequest


async def answer(
    provider: Provider, model: str, messages: Sequence[Message], sampling: Sampling, show: Callable[[str], None]
) -> str:
    """The whole answer; its pieces go to `show` as they come. Raises ProviderError."""
    pieces: list[str] = []
    async for piece in provider.stream(model, messages, sampling):
        pieces.append(piece)
        show(piece)
    return "".join(pieces)


def ask_once(url: str, model: str, messages: Sequence[Message], sampling: Sampling, show: Callable[[str], None]) -> str:
    """One answer from the server at `url`. Raises BadRequest with the models there are where `model` is none of them."""

    async def run() -> str:
        provider = OllamaProvider(url)
        try:
            names = await provider.models()
            if model not in names and f"{model}:latest" not in names:
                known = ", ".join(sorted(names)) or "none"
                raise BadRequest(f'there is no model "{model}" at {url}', hint=f"models there: {known}")
            return await answer(provider, model, messages, sampling, show)
        finally:
            await provider.aclose()

    return anyio.run(run)
