"""What the three providers have in common: connections that break or fall silent, and keys that nobody may see."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import anyio
import pytest

from agents.providers.base import Provider
from agents.providers.gemini import GeminiProvider
from agents.providers.ollama import OllamaProvider
from agents.providers.openai_compatible import OpenAIProvider
from agents.providers.transport import checked_key, retry_after_s
from agents.task import Sampling
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ProviderError, ProviderUnavailable

KEY = "AIzaSyA-planted-key_0123456789"
QUESTION = [Message(role="user", content="hi")]
FIRST_PIECES = {
    "ollama": b'{"message": {"role": "assistant", "content": "Pa"}, "done": false}\n',
    "gemini": b'data: {"candidates": [{"content": {"parts": [{"text": "Pa"}]}}]}\r\n\r\n',
    "openai": b'data: {"choices": [{"delta": {"content": "Pa"}, "finish_reason": null}]}\n\n',
}
PROVIDERS: dict[str, Callable[..., Provider]] = {
    "ollama": lambda url, **more: OllamaProvider(url, **more),
    "gemini": lambda url, **more: GeminiProvider(base_url=url, api_key=KEY, **more),
    "openai": lambda url, **more: OpenAIProvider(url, api_key=KEY, **more),
}
each_provider = pytest.mark.parametrize("name", PROVIDERS)


async def with_server(answer: bytes, work: Callable[[str], Awaitable[Any]], *, hang: bool = False) -> Any:
    """A server that sends these bytes whatever it is asked, then closes the connection, or falls silent."""
    released = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(answer)
        await writer.drain()
        if hang:
            await released.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        return await work(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        released.set()
        server.close()


def failure(name: str, answer: bytes, *, hang: bool = False, **settings: Any) -> ProviderError:
    """The error that one request ends with."""

    async def work(url: str) -> ProviderError:
        provider = PROVIDERS[name](url, **settings)
        try:
            with pytest.raises(ProviderError) as raised:
                await provider.generate("model", QUESTION, Sampling())
            return raised.value
        finally:
            await provider.aclose()

    found = anyio.run(with_server, answer, work) if not hang else anyio.run(lambda: with_server(answer, work, hang=True))
    assert isinstance(found, ProviderError)
    return found


def head(kind: str = "application/json", length: int | None = None, status: str = "200 OK") -> bytes:
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{size}\r\n".encode()


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("nan", None), ("inf", None)]
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after_s({"retry-after": value}) == seconds


def test_retry_after_as_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after_s({"retry-after": later}) == pytest.approx(30, abs=2)
    assert retry_after_s({}) is None


@each_provider
@pytest.mark.parametrize("sent", [b"", head(length=100) + b"{"])
def test_a_connection_that_drops_may_have_been_billed(name: str, sent: bytes) -> None:
    error = failure(name, sent)
    assert isinstance(error, ProviderUnavailable) and error.billable
    assert "the connection to http://127.0.0.1" in str(error) and error.hint


@each_provider
def test_nobody_there_costs_nothing(name: str) -> None:
    async def work() -> None:
        provider = PROVIDERS[name]("http://127.0.0.1:9")
        with pytest.raises(ProviderUnavailable, match="cannot connect to http://127.0.0.1:9") as raised:
            await provider.generate("model", QUESTION, Sampling())
        assert not raised.value.billable and raised.value.hint
        assert str(raised.value).lower().count("cannot connect") == 1
        await provider.aclose()

    anyio.run(work)


@each_provider
def test_an_answer_that_falls_silent_is_given_up(name: str) -> None:
    kind = "application/x-ndjson" if name == "ollama" else "text/event-stream"
    error = failure(name, head(kind) + FIRST_PIECES[name], hang=True, idle_timeout_s=0.05)
    assert isinstance(error, ProviderUnavailable) and error.billable
    assert "fell silent for 0.05 s" in str(error)


@pytest.mark.parametrize("name", ["gemini", "openai"])
def test_an_answer_that_never_comes_after_its_head_is_given_up(name: str) -> None:
    assert "fell silent" in str(failure(name, head("text/event-stream"), hang=True, idle_timeout_s=0.05))


@each_provider
def test_a_redirect_is_not_followed(name: str, canned: Any) -> None:
    elsewhere = canned({}, status=307, headers={"Location": "/elsewhere"})
    with pytest.raises(BadRequest, match="sends its callers to /elsewhere"):
        anyio.run(elsewhere.ask, PROVIDERS[name], lambda provider: provider.generate("model", QUESTION, Sampling()))
    assert len(elsewhere.paths) == 1


TOLD = f'{{"error": {{"message": "your key is {KEY}", "details": [{{"reason": "{KEY}"}}]}}}}'.encode()
MISSHAPEN = f'{{"error": "{KEY}", "candidates": "{KEY}", "message": "{KEY}"}}'.encode()
LEAKS = [
    b"",
    b"this is not HTTP\r\n\r\n",
    head(length=9) + b"{",
    head(status="302 Found\r\nLocation: /") + KEY.encode(),
    *(head(status=f"{status} X") + TOLD for status in (400, 401, 404, 429, 500, 503)),
    head(status="500 X") + f"<html>{KEY}".encode(),
    head() + f'"{KEY}"'.encode(),
    head() + MISSHAPEN,
    head() + TOLD,
]


@each_provider
@pytest.mark.parametrize("answer", LEAKS)
@pytest.mark.parametrize("settings", [{}, {"idle_timeout_s": 5.0}])
def test_a_key_is_nowhere_to_be_seen(
    name: str, answer: bytes, settings: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG):
        error = failure(name, answer, **settings)
    shown = [str(error), repr(error), error.hint, "".join(traceback.format_exception(error)), repr(PROVIDERS[name]("http://x"))]
    assert not any(KEY in text for text in [*shown, caplog.text])


@pytest.mark.parametrize("key", ["a key", "schlüssel", "a\nb", "a\x00b"])
def test_what_is_no_key_is_refused_without_telling_it(key: str) -> None:
    with pytest.raises(AuthFailed) as raised:
        checked_key(key, "GEMINI_API_KEY")
    assert "GEMINI_API_KEY" in str(raised.value) and key not in str(raised.value)
    assert checked_key(" key\r\n", "") == "key"


@pytest.mark.parametrize(
    ("host", "proxied"), [("192.168.1.5", False), ("gpu.lan", False), ("[::1]", False), ("api.example.com", True)]
)
@pytest.mark.parametrize("name", ["gemini", "openai"])
def test_what_is_meant_for_a_server_at_home_goes_through_no_proxy(
    name: str, host: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[Any] = []

    async def connect(_: aiohttp.TCPConnector, request: aiohttp.ClientRequest, *__: Any) -> None:
        ways.append(request.proxy)
        raise OSError("a test goes nowhere")

    async def work() -> None:
        provider = PROVIDERS[name](f"http://{host}:1/v1")
        with pytest.raises(ProviderUnavailable):
            await provider.generate("model", QUESTION, Sampling())
        await provider.aclose()

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", connect)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    anyio.run(work)
    assert [way is not None for way in ways] == [proxied]
