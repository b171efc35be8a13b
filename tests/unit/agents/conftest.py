"""Tests of the scheduler run on the virtual clock of agents/virtual_time.py.

Tests of the providers ask a server on loopback that answers with prepared bodies.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from agents.providers.base import Provider
from agents.virtual_time import run_virtual


@pytest.fixture(scope="session")
def virtual() -> Callable[..., Any]:
    """`virtual(work, *args)` runs a coroutine function in virtual time and returns its result."""
    return run_virtual


class CannedServer:
    """A server on loopback that gives prepared answers in turn, the last one for ever, and keeps what it was asked."""

    def __init__(self, *answers: web.Response) -> None:
        self._answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.asked: list[dict[str, str]] = []

    async def _answer(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        self.asked.append(dict(request.query))
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.requests.append(await request.json() if request.can_read_body else {})
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    async def ask(self, open_provider: Callable[[str], Provider], call: Callable[[Provider], Awaitable[Any]]) -> Any:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider = open_provider(f"http://127.0.0.1:{runner.addresses[0][1]}")
        try:
            return await call(provider)
        finally:
            await provider.aclose()
            await runner.cleanup()


@pytest.fixture
def canned() -> Callable[..., CannedServer]:
    """`canned(*bodies, status=200, headers=…)`: a server that answers with these, in turn; bytes go out as they are."""

    def make(*bodies: Any, status: int = 200, headers: dict[str, str] | None = None) -> CannedServer:
        raw = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
        kind = {"Content-Type": "application/json", **(headers or {})}
        return CannedServer(*(web.Response(body=body, status=status, headers=kind) for body in raw))

    return make
