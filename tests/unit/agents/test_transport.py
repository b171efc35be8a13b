import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import anyio
import pytest

from agents.providers.ollama import OllamaProvider
from agents.providers.transport import retry_after_s
from agents.task import Sampling
from config.contracts.sample import Message
from config.errors import ProviderUnavailable


@pytest.mark.parametrize(("value", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None)])
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after_s({"retry-after": value}) == seconds


def test_retry_after_as_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after_s({"retry-after": later}) == pytest.approx(30, abs=2)
    assert retry_after_s({}) is None


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_a_connection_that_drops_may_have_been_billed(sent: bytes) -> None:
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        writer.write(sent)
        await writer.drain()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(drop, "127.0.0.1", 0)
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        provider = OllamaProvider(host)
        async with server:
            with pytest.raises(ProviderUnavailable, match=f"the connection to {host} broke") as raised:
                await provider.generate("m", [Message(role="user", content="hi")], Sampling())
        assert raised.value.billable
        await provider.aclose()

    anyio.run(work)
