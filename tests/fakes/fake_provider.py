"""A provider without a server: it answers from a script, in order, each entry once."""

from collections.abc import AsyncIterator, Iterable, Sequence

import anyio

from agents.task import Completion, Sampling, Usage
from config.contracts.sample import Message
from config.errors import ProviderError

Entry = str | Completion | ProviderError


class FakeProvider:
    """`script` may be endless. A text stands for a completion that stopped by itself. `latency_s` passes before each entry."""

    def __init__(self, script: Iterable[Entry], *, latency_s: float = 0.0, name: str = "ollama") -> None:
        self.name = name
        self.calls = 0
        self.peak = 0  # most calls at once
        self._script = iter(script)
        self._latency_s = latency_s
        self._in_flight = 0

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """Raises RuntimeError where the script has ended."""
        self.calls += 1
        self._in_flight += 1
        self.peak = max(self.peak, self._in_flight)
        try:
            entry = next(self._script, None)
            await anyio.sleep(self._latency_s)
        finally:
            self._in_flight -= 1
        if entry is None:
            raise RuntimeError(f"the script of {self.name} has ended before call {self.calls}")
        if isinstance(entry, ProviderError):
            raise entry
        if isinstance(entry, Completion):
            return entry
        usage = Usage(
            prompt_tokens=sum(len(message.content.split()) for message in messages), completion_tokens=len(entry.split())
        )
        return Completion(entry, "stop", usage, model, self._latency_s)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        completion = await self.generate(model, messages, sampling)
        for word in completion.text.split(" "):
            yield f"{word} "

    async def models(self) -> list[str]:
        return ["fake"]

    async def aclose(self) -> None:
        """Nothing is open."""
