"""The embedded runtime: an HTTP server that speaks Ollama's API, with llama.cpp behind it, for machines without Ollama.

It listens on 127.0.0.1 only. One runs per root, held by a lock that the operating system frees with the process.
`runtime.json` exists from the moment it listens; it is a hint that the reader checks, never a lock.
"""

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from aiohttp import web

from config.errors import ConfigError, StoreHeld
from config.files import write_atomic
from config.locks import FileLock
from trainer_node.processes import identify_self
from trainer_node.runtime.answers import Answers
from trainer_node.runtime.launch import require_runtime
from trainer_node.runtime.manage import Manage
from trainer_node.runtime.models import Store
from trainer_node.runtime.openai import OpenAi
from trainer_node.runtime.pool import Limits, Pool
from trainer_node.runtime.requests import MAX_BODY_BYTES, Handler, guard, json_reply, translate

VERSION = "0.34.1"  # of Ollama's API that is spoken: from this one on a server neither converts nor quantizes
SHUTDOWN_S = 1.0  # grace for running answers


def serve(root: Path, port: int = 0, idle_exit_s: float | None = None) -> None:
    """Serve until SIGTERM, SIGINT or `idle_exit_s` seconds without a request. Port 0: any free one.

    Raises:
        MissingExtra: llama.cpp (xllamacpp) is not installed.
        ConfigError: the port is taken.
        StoreHeld: another runtime serves this root.
    """
    require_runtime()
    folder = root / "runtime"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "runtime.lock")
    if not lock.acquire():
        raise StoreHeld(f"another runtime serves {root}", hint="use that one, or end it first")
    try:
        asyncio.run(_serve(folder, port, idle_exit_s))
    finally:
        lock.release()


async def _serve(folder: Path, port: int, idle_exit_s: float | None) -> None:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    store = Store(folder)
    store.prune()
    pool = Pool(Limits.from_environment())
    runner = web.AppRunner(
        application(store, pool, IdleTimer(idle_exit_s, stop)),
        handler_cancellation=True,  # a client that hangs up stops its generation
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
    )
    await runner.setup()
    info = folder / "runtime.json"
    try:
        await _listen(runner, port)
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        write_atomic(info, json.dumps({"url": url, **asdict(identify_self())}).encode())
        await stop.wait()
    finally:
        info.unlink(missing_ok=True)
        await runner.cleanup()
        await pool.close()


async def _listen(runner: web.AppRunner, port: int) -> None:
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on 127.0.0.1:{port}: {os.strerror(error.errno or 0)}",
            hint="end what listens there, or choose another --port (0: any free one)",
        ) from error


def application(store: Store, pool: Pool, idle: "IdleTimer") -> web.Application:
    """The routes over a store and a pool of engines."""
    app = web.Application(middlewares=[guard, idle.middleware, translate], client_max_size=MAX_BODY_BYTES)
    manage, answers = Manage(store, pool), Answers(store, pool)
    openai = OpenAi(store, answers)
    app.add_routes(
        [
            web.get("/", _alive),
            web.get("/api/version", _version),
            web.get("/api/tags", manage.tags),
            web.get("/api/ps", manage.ps),
            web.post("/api/show", manage.show),
            web.post("/api/create", manage.create),
            web.post("/api/copy", manage.copy),
            web.delete("/api/delete", manage.delete),
            web.head("/api/blobs/{digest}", manage.has_blob),
            web.post("/api/blobs/{digest}", manage.put_blob),
            web.post("/api/chat", answers.chat),
            web.post("/api/generate", answers.generate),
            web.post("/api/embed", answers.embed),
            web.post("/api/tokenize", answers.tokenize),
            web.get("/v1/models", openai.models),
            web.get("/v1/models/{name:.+}", openai.model),
            web.post("/v1/chat/completions", openai.chat),
        ]
    )
    return app


async def _alive(request: web.Request) -> web.Response:
    return web.Response(body=b"Ollama is running", headers={"Content-Type": "text/plain; charset=utf-8"})


async def _version(request: web.Request) -> web.Response:
    return json_reply({"version": VERSION})


class IdleTimer:
    """Sets `stop` once no request was answered or running for `limit_s` seconds; None: never."""

    def __init__(self, limit_s: float | None, stop: asyncio.Event) -> None:
        self._limit_s = limit_s
        self._stop = stop
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None
        self._restart()

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._running += 1
            self._restart()
            try:
                return await handler(request)
            finally:
                self._running -= 1
                self._restart()

        self.middleware = middleware

    def _restart(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._limit_s is not None and not self._running:
            self._timer = asyncio.get_running_loop().call_later(self._limit_s, self._stop.set)


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        if sys.platform == "win32":  # its event loop takes no handlers
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
        else:
            loop.add_signal_handler(number, stop.set)
