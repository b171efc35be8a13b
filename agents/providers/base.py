"""The one Protocol all model servers are spoken to through."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from agents.task import Completion, Sampling
from config.contracts.sample import Message


class Provider(Protocol):
    """A model server. Every lower error is translated here, once, into the ProviderError tree of config.errors.

    `generate` raises RateLimited, ProviderUnavailable, AuthFailed, BadRequest or Blocked; cancellation passes through.
    An answer that was cut (length, an early end of the stream, a prompt that did not fit) is returned with its finish reason,
    or raised as ProviderUnavailable if the server did not say how it ended; it is never returned as "stop".
    """

    name: str

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion: ...

    def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        """Pieces of the answer as they come; raises where `generate` would. Ends only when the model has stopped."""
        ...

    async def models(self) -> list[str]:
        """Names the server has now. Raises ProviderUnavailable where it cannot be reached."""
        ...

    async def aclose(self) -> None: ...
