"""From the API of `hafs serve` to the node's model server, which may end and come back meanwhile.

A request that could not reach the server is asked once more, after the server was looked for (and, if it is hafs's own, started).
What has begun is never asked twice. Who leaves takes the answer with him: the server stops at once.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing

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
        self._held = ExitStack()
        self._provider: OllamaProvider | None = None
        self._url = ""
        self._search = anyio.Lock()

    async def __aenter__(self) -> "Gateway":
        await self._find(None)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._provider is not None:
            await self._provider.aclose()
        await anyio.to_thread.run_sync(self._held.close)

    async def told(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[str | Completion]:
        """The pieces of an answer, then all of it. Raises ProviderError, NodeError; BadRequest for a prompt that does not fit."""
        begun = False
        for last_try in (False, True):
            provider = self._provider
            assert provider is not None, "entered"
            try:
                async with aclosing(provider.told(self.model, messages, sampling)) as parts:
                    async for part in parts:
                        begun = True
                        if isinstance(part, Completion):
                            require_told(self._url, part.finish_reason, part.detail, sampling)
                        yield part
                return
            except ProviderUnavailable as error:
                if begun or last_try or error.billable or isinstance(error, Overloaded):
                    raise
            await self._find(provider)

    async def alive(self) -> None:
        """Raises ProviderError where the server does not answer."""
        assert self._provider is not None, "entered"
        await self._provider.models()

    async def _find(self, failed: OllamaProvider | None) -> None:
        """Look for the server, unless somebody else has found it since `failed` did."""
        async with self._search:
            if self._provider is not failed:
                return
            held = ExitStack()
            server = await anyio.to_thread.run_sync(held.enter_context, self._server())
            self._held, before = held, self._held
            self._url, self._provider = server.url, OllamaProvider(server.url)
        await anyio.to_thread.run_sync(before.close)
        if failed is not None:
            await failed.aclose()

    def _server(self) -> AbstractContextManager[Server]:
        return server_of(self._node, before=self._before)
