"""The HTTP ground under the providers, and what all of them do to an answer.

- Everything goes over aiohttp, whose pool stays fast with many open connections; it has no limit: the scheduler's slots are one.
- SDKs let errors of the transport through as they are (a connection that drops in mid-answer): they are translated here, and not
  chained, because they carry the headers of the request, so the key.
"""

import json
import math
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, TypeVar
from urllib.request import getproxies

import aiohttp
import anyio
from aiohttp.tracing import Trace

from agents.task import FinishReason, Sampling
from config.errors import AuthFailed, BadRequest, Blocked, ConfigError, ProviderError, ProviderUnavailable
from config.settings import plain_address

CONNECT_S = 10.0
SILENCE_S = 600.0  # without a byte; a lane's own timeout is shorter
PROMPT_CUT = "prompt cut"
INVALID_JSON = "invalid JSON"
_LONGEST_MESSAGE = 300  # characters of what a server says

Piece = TypeVar("Piece")


class _Connector(aiohttp.TCPConnector):
    """A connection is made in time or not at all: SDKs set only a total time, at whose end nobody knows what was billed."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 (aiohttp's own name)
    ) -> aiohttp.connector.Connection:
        soon = aiohttp.ClientTimeout(connect=timeout.connect, sock_connect=CONNECT_S)
        return await super().connect(req, traces, soon)


def open_session(*, trust_env: bool) -> aiohttp.ClientSession:
    """A pool of connections for the running event loop. `trust_env`: heed HTTP_PROXY and its kin, as they are now."""
    return aiohttp.ClientSession(
        connector=_Connector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S),
        trust_env=trust_env and bool(getproxies()),  # else each request would look for them, and for a netrc file
    )


_NAMES_THE_HOST = re.compile(r"^Cannot connect to host \S+ ssl:.+? \[(.+)\]$")  # aiohttp's words: ours name it already


@contextmanager
def translate_transport_errors(host: str, refused_hint: str, secret: str = "") -> Iterator[None]:
    """Turn what the transport raises into ProviderUnavailable naming `host`; `refused_hint` is for a server that is not there."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        what = clip(str(error) or type(error).__name__, secret)
        if _never_reached(error):
            what = _NAMES_THE_HOST.sub(r"\1", what)
            raise ProviderUnavailable(f"cannot connect to {host}: {what}", billable=False, hint=refused_hint) from None
        raise ProviderUnavailable(f"the connection to {host} broke: {what}", hint="look at the server's log") from None


def _never_reached(error: BaseException) -> bool:
    return isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL)


async def in_time(pieces: AsyncIterator[Piece], idle_timeout_s: float | None, name: str) -> AsyncIterator[Piece]:
    """The pieces of an answer that has begun.

    Raises:
        ProviderUnavailable: none came for `idle_timeout_s` (None: as long as it takes).
    """
    while True:
        with anyio.CancelScope(deadline=anyio.current_time() + (idle_timeout_s or math.inf)) as waiting:
            piece = await anext(pieces, None)
        if waiting.cancelled_caught:
            raise ProviderUnavailable(
                f"{name} fell silent for {idle_timeout_s:g} s in its answer", hint="raise the lane's idle_timeout"
            )
        if piece is None:
            return
        yield piece


def checked_key(key: str, where: str) -> str:
    """A key as it may stand in a header. Raises AuthFailed for what is no key (its text is not told)."""
    key = key.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise AuthFailed(f"{where} holds no key: there are characters in it that no key has", hint="copy the key once more")
    return key


def checked_address(address: str, where: str) -> str:
    """An address as it may stand in messages. Raises ConfigError for one that may hold a secret (it is not told)."""
    if not plain_address(address):
        raise ConfigError(f"{where} holds a user, a password or a query", hint="an address stands in logs: leave them out")
    return address


def clip(text: str, secret: str = "") -> str:
    """One line of sensible length, without the secret."""
    line = " ".join(hide(text, secret).split())
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}…"


def hide(text: str, secret: str) -> str:
    """Text without the secret, however JSON or an address would write it: as it is, with backslashes, \\uXXXX, %XX."""
    return _spellings(secret).sub("***", text) if secret else text


@lru_cache(maxsize=32)
def _spellings(secret: str) -> re.Pattern[str]:
    return re.compile("".join(rf"(?:\\*{re.escape(sign)}|(?i:\\+u{ord(sign):04x}|%{ord(sign):02x}))" for sign in secret))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that a Retry-After header asks for, in seconds; None where it is absent or unreadable."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / scale
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        return max(0.0, (parsedate_to_datetime(headers.get("retry-after", "")) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


@lru_cache(maxsize=32)
def decoded_schema(text: str) -> Any:
    """The JSON Schema of a `Sampling`, as it goes into a request. Raises ConfigError where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the JSON Schema of the answers is no JSON: {error}", hint="check json_schema") from error


def judged(text: str, finish: FinishReason, detail: str, sampling: Sampling) -> tuple[FinishReason, str]:
    """How an answer ended, what is no JSON although a schema was asked for being no whole answer."""
    if finish != "stop" or not sampling.schema:
        return finish, detail
    try:
        json.loads(text)
    except ValueError:
        return "other", INVALID_JSON
    return finish, detail


def require_whole(name: str, finish: FinishReason, detail: str, sampling: Sampling) -> None:
    """Raise for a streamed answer that is not whole: Blocked, BadRequest (a cut prompt), ProviderError."""
    match finish:
        case "length":
            raise ProviderError(f"the answer was cut at {sampling.max_tokens} tokens", hint="ask for more tokens")
        case "blocked":
            raise Blocked(f"{name} refused to answer: {detail}", hint="ask in other words")
        case "other" if detail == PROMPT_CUT:
            raise BadRequest(f"{name} cut the prompt to fit {sampling.num_ctx} tokens", hint="raise num_ctx")
        case "other":
            raise ProviderError(f"{name} broke off its answer: {detail}", hint="ask again")
