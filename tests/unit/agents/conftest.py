"""Tests of the scheduler run on a virtual clock: when every task sleeps, the time jumps to the next timer.

Tests of the providers ask a server on loopback that answers with prepared bodies.
"""

import asyncio
import json
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from aiohttp import web

from agents.providers.base import Provider


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for the timeout it moves the loop's time. A loop that would sleep for ever is a deadlock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("deadlock: nothing runs and no timer is set")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtual(work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    return anyio.run(work, *args, backend_options={"loop_factory": VirtualTimeLoop})


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

    async def _answer(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
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
