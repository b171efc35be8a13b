"""The one Protocol all model servers are spoken to through."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from agents.task import Completion, Sampling
from config.contracts.sample import Message


class Provider(Protocol):
    """A model server. Every lower error is translated here, once, into the ProviderError tree of config.errors.

    `generate` raises RateLimited, ProviderUnavailable, AuthFailed, ModelMissing or BadRequest; cancellation passes through.
    An answer that was cut (length, a prompt that did not fit) or blocked for safety is returned with its finish reason and
    usage. Where the server did not say how it ended (an early end of the stream, no JSON) ProviderUnavailable is raised.
    Nothing but a whole answer is ever returned as "stop".
    """

    name: str

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion: ...

    def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        """Pieces of the answer as they come; raises where `generate` would, and Blocked. Ends only when the model has stopped."""
        ...

    async def models(self) -> list[str]:
        """Names the server has now: free of charge, so it is also how a server that was down is tried.

        Raises ProviderUnavailable where it cannot be reached, AuthFailed where it refuses the key.
        """
        ...

    async def aclose(self) -> None: ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A provider that keeps answers until it is told that they are safe: a call that is made again gets the same one, unpaid."""

    def stored(self, model: str, messages: Sequence[Message], sampling: Sampling) -> None: ...
