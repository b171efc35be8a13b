"""From the API of `hafs serve` to the node's model server, which may end and come back meanwhile.

A request that could not reach the server is asked once more, after the server was looked for (and, if it is hafs's own, started).
What has begun is never asked twice. Who leaves takes the answer with him: the server stops at once.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager

import anyio
import anyio.to_thread

from agents.providers.ollama import OllamaProvider
from agents.task import Completion, Sampling
from campaigns.chat import require_told
from campaigns.serving import Server, server_of
from campaigns.sync.remote import Node
from config.contracts.sample import Message
from config.errors import Overloaded, ProviderUnavailable


class Gateway:
    """An async context manager; `model` is the one model that it asks.

    Args:
        before: the server as it was found: an Ollama is not replaced by hafs's own runtime.
    """

    def __init__(self, node: Node, model: str, before: Server) -> None:
        self.model = model
        self._node, self._before = node, before
        self._way: _Way | None = None
        self._search = anyio.Lock()

    async def reach(self) -> None:
        """Look for the server before this is entered: an error is still the command's own. Raises ProviderError, NodeError."""
        await self._find(None)

    async def __aenter__(self) -> "Gateway":
        await self._find(None)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._way is not None:
            await self._way.leave()

    async def told(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[str | Completion]:
        """The pieces of an answer, then all of it. Raises ProviderError, NodeError; BadRequest for a prompt that does not fit."""
        begun = False
        for last_try in (False, True):
            async with self._used() as way:
                try:
                    async with aclosing(way.provider.told(self.model, messages, sampling)) as parts:
                        async for part in parts:
                            begun = True
                            if isinstance(part, Completion):
                                require_told(way.url, part.finish_reason, part.detail, sampling)
                            yield part
                    return
                except ProviderUnavailable as error:
                    if begun or last_try or error.billable or isinstance(error, Overloaded):
                        raise
            await self._find(way)

    async def alive(self) -> None:
        """Raises ProviderError where the server does not answer."""
        async with self._used() as way:
            await way.provider.models()

    @asynccontextmanager
    async def _used(self) -> "AsyncIterator[_Way]":
        way = self._way
        assert way is not None, "entered"
        way.users += 1
        try:
            yield way
        finally:
            await way.leave()

    async def _find(self, failed: "_Way | None") -> None:
        """Look for the server, unless somebody else has found it since `failed` did."""
        async with self._search:
            if self._way is not failed:
                return
            held = ExitStack()
            server = await anyio.to_thread.run_sync(held.enter_context, server_of(self._node, before=self._before))
            self._way = _Way(server, held)
            if failed is not None:
                await failed.leave()


class _Way:
    """A way to the server. One that failed for somebody may carry answers of others: the last of its `users` closes it."""

    def __init__(self, server: Server, held: ExitStack) -> None:
        self.url, self.provider = server.url, OllamaProvider(server.url)
        self.users = 1  # the gateway, until it has found another
        self._held = held

    async def leave(self) -> None:
        self.users -= 1
        if self.users:
            return
        with anyio.CancelScope(shield=True):  # a client that hangs up must leave no port of a tunnel open
            await self.provider.aclose()
            await anyio.to_thread.run_sync(self._held.close)
