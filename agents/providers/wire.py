"""JSON over HTTP to one server, for an API that has no SDK of ours.

- Whatever goes wrong leaves as a ProviderError that names the server. What the server says is clipped, and its key taken out.
- Nothing is sent twice, and no redirect is followed: waiting and trying again is the scheduler's work.
- A stream that ends has ended at the server; whether the answer was whole is for the provider to see.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError

from agents.addresses import at_home
from agents.providers.transport import clip, hide, in_time, open_session, translate_transport_errors
from config.errors import BadRequest, ProviderError, ProviderUnavailable

Read = TypeVar("Read")


@dataclass(frozen=True)
class Refusal:
    """An answer with an error status, or an error inside a stream that began with 200."""

    status: int
    headers: Mapping[str, str]
    body: Any  # decoded JSON, or text where it is none
    text: str  # the start of the body


class Wire:
    """JSON requests to one server.

    Args:
        url: what every path is put behind.
        name: the server in messages.
        api: whose API the server is said to speak.
        refused: turns an error answer into an error of ours.
        headers: sent with every request.
        secret: a key; it occurs in no message.
        hint: what to do where the server cannot be reached.
        proxy: heed HTTP_PROXY and its kin. A server of this machine or of a private network is never asked through a proxy.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        api: str,
        refused: Callable[[Refusal], ProviderError],
        hint: str,
        headers: Mapping[str, str] | None = None,
        secret: str = "",
        proxy: bool = False,
    ) -> None:
        self._url = url.rstrip("/")
        self._name = name
        self._api = api
        self._refused = refused
        self._hint = hint
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._secret = secret
        self._proxy = proxy and not at_home(urlsplit(url).hostname or "")
        self._opened: aiohttp.ClientSession | None = None

    async def get(self, path: str, read: Callable[[bytes], Read]) -> Read:
        """What `read` makes of the reply; it may raise pydantic's ValidationError. Raises ProviderError."""
        async with self._request("GET", path, None) as reply:
            return read(await reply.read())

    async def post(self, path: str, body: object, read: Callable[[bytes], Read]) -> Read:
        """As `get`."""
        async with self._request("POST", path, body) as reply:
            return read(await reply.read())

    async def stream(
        self, path: str, body: object, read: Callable[[bytes], Read], idle_timeout_s: float | None = None
    ) -> AsyncGenerator[Read]:
        """What `read` makes of each JSON document of a reply, as they come: lines of NDJSON, or events.

        `idle_timeout_s` is how long none may come once the reply has begun. Raises ProviderError.
        """
        async with self._request("POST", path, body) as reply:
            async for document in in_time(_documents(reply.content), idle_timeout_s, self._name):
                yield read(document)

    async def aclose(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    def error_inside(self, body: object, status: object = None, *, begun: bool) -> ProviderError:
        """The error that a document inside a stream stands for; once the answer has `begun` it may be billed."""
        text = hide(json.dumps(body), self._secret)
        known = status if isinstance(status, int) else 500
        error = self._refused(Refusal(known, {}, json.loads(text), clip(text)))
        return ProviderUnavailable(str(error), hint=error.hint) if begun else error

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: object) -> AsyncIterator[aiohttp.ClientResponse]:
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        with self._translated():
            async with self._session().request(
                method, self._url + path, data=data, headers=self._headers, allow_redirects=False
            ) as reply:
                if not 200 <= reply.status < 300:
                    raise await self._refusal(reply)
                yield reply

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:  # with the first request: it belongs to the running event loop
            self._opened = open_session(trust_env=self._proxy)
        return self._opened

    async def _refusal(self, reply: aiohttp.ClientResponse) -> ProviderError:
        text = hide((await reply.read()).decode(errors="replace"), self._secret)
        if 300 <= reply.status < 400:
            where = clip(reply.headers.get("Location", "elsewhere"), self._secret)
            return BadRequest(f"{self._name} sends its callers to {where}", hint="give that address in the spec")
        try:
            body = json.loads(text)
        except ValueError:
            body = text
        return self._refused(Refusal(reply.status, reply.headers, body, clip(text) or reply.reason or str(reply.status)))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translate_transport_errors(self._name, self._hint, self._secret):
                yield
        except ValidationError as error:
            what = error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"]
            raise ProviderUnavailable(
                f"{self._name} does not answer as {self._api} does: {what}", hint="check the lane's address"
            ) from None


async def _documents(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The JSON documents of a body of events, or of lines."""
    rest = b""
    while chunk := await content.readany():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if document := _document(line):
                yield document
    if document := _document(rest):
        yield document


def _document(line: bytes) -> bytes:
    """The JSON document of a line; empty for what is none (comments and other fields of events, the end mark of OpenAI)."""
    line = line.strip()
    if line.startswith(b"data:"):
        line = line[5:].strip()
    elif line.startswith((b":", b"event:", b"id:", b"retry:")):
        return b""
    return b"" if line == b"[DONE]" else line
