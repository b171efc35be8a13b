"""The HTTP ground under the SDKs. httpx's own pool costs time with every open connection, so SDKs get aiohttp's instead.

The SDKs let errors of the transport through as they are (a connection that drops in mid-answer): they are translated here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from config.errors import ProviderUnavailable

CONNECT_S = 10.0
SILENCE_S = 600.0  # without a byte; a lane's own timeout is shorter


def aiohttp_transport(*, trust_env: bool) -> AiohttpTransport:
    """A transport without a connection limit: the scheduler's slots are the limit. `trust_env`: heed HTTP_PROXY."""

    def session() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)  # "no limit" given to httpx would become aiohttp's default of 100
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=trust_env)

    return AiohttpTransport(client=session)


def timeouts() -> httpx.Timeout:
    return httpx.Timeout(SILENCE_S, connect=CONNECT_S, pool=CONNECT_S)


@contextmanager
def translate_transport_errors(host: str, refused_hint: str) -> Iterator[None]:
    """Turn what the transport raises into ProviderUnavailable naming `host`; `refused_hint` is for a server that is not there."""
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, OSError) as error:
        if _never_reached(error):
            raise ProviderUnavailable(f"cannot connect to {host}", billable=False, hint=refused_hint) from error
        what = str(error) or type(error).__name__
        raise ProviderUnavailable(f"the connection to {host} broke: {what}", hint="look at the server's log") from error


def _never_reached(error: BaseException) -> bool:
    # The transport reports a refused connection as a ConnectTimeout, and a dropped one too: only the cause tells them apart.
    # A bare ConnectionError is what ollama makes of a refused one.
    refused = (aiohttp.ClientConnectorError, httpx.ConnectError, httpx.UnsupportedProtocol)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, refused) or type(cause) is ConnectionError:
            return True
        cause = cause.__cause__
    return False


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that a Retry-After header asks for, in seconds; None where it is absent or unreadable."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
