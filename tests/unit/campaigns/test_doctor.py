"""`hafs doctor` against real servers on loopback: what is missing is named, with what to do."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from time import time

import pytest
from aiohttp import web

from campaigns import doctor
from campaigns.doctor import Check, examine
from campaigns.spec import CampaignSpec
from config.settings import load_settings
from tests.fakes.campaign_rows import spec

AHEAD_S = 3600


async def tags(_: web.Request) -> web.Response:
    return web.json_response({"models": [{"name": "qwen3:latest", "model": "qwen3:latest"}]})


async def gemini_models(request: web.Request) -> web.Response:
    if request.headers["x-goog-api-key"] != "right":
        error = {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}
        details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
        return web.json_response({"error": {**error, "details": details}}, status=400)
    return web.json_response({"models": [{"name": "models/gemini-x"}]})


async def slow_clock(_: web.Request) -> web.Response:
    return web.Response(headers={"Date": formatdate(time() - AHEAD_S, usegmt=True)})


@contextmanager
def served() -> Iterator[str]:
    """An Ollama and a Gemini in one, in a loop of its own: doctor runs one itself."""
    app = web.Application()
    app.router.add_get("/api/tags", tags)
    app.router.add_get("/{version:v1(beta)?}/models", gemini_models)
    app.router.add_route("HEAD", "/", slow_clock)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    ready = threading.Event()

    async def serve() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture
def url() -> Iterator[str]:
    with served() as address:
        yield address


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", "http://127.0.0.1:9")


def found(name: str, of: CampaignSpec | None = None) -> Check:
    return next(check for check in examine(load_settings(), of) if check.name == name)


def ollama(url: str, model: str) -> CampaignSpec:
    return spec(lanes={"gpu": {"provider": "ollama", "model": model, "host": url}})


def test_this_machine_is_ready() -> None:
    checks = {check.name: check for check in examine(load_settings())}
    for name in ("Python", "hafs itself", "laptop packages", "folder", "disk", "keys.toml"):
        assert checks[name].verdict == "ok", checks[name]
    assert checks["Gemini"].verdict == checks["Ollama"].verdict == "warn"
    assert "ollama serve" in checks["Ollama"].hint


def test_a_lanes_server_and_its_models(url: str) -> None:
    assert found("lane gpu", ollama(url, "qwen3")).verdict == "ok"
    missing = found("lane gpu", ollama(url, "other:7b"))
    assert (missing.verdict, missing.detail) == ("fail", "it does not have other:7b")
    assert "--pull" in missing.hint
    assert found("lane gpu", ollama("http://127.0.0.1:9", "qwen3")).verdict == "fail"


@pytest.mark.parametrize(("key", "verdict"), [("", "fail"), ("wrong", "fail"), ("right", "ok")])
def test_a_key_for_gemini_is_tried(url: str, monkeypatch: pytest.MonkeyPatch, key: str, verdict: str) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", key)
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
    check = found("Gemini", spec(lanes={"flash": {"provider": "gemini", "model": "gemini-x", "base_url": url}}))
    assert check.verdict == verdict, check
    assert check.hint or verdict == "ok"
    assert not key or key not in check.detail


def test_what_a_spec_does_without_is_not_looked_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "right")
    names = [check.name for check in examine(load_settings(), ollama(url, "qwen3"))]
    assert "Gemini" not in names and "clock" not in names and "lane gpu" in names


def test_a_clock_that_is_wrong_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "right")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
    check = found("clock")
    assert check.verdict == "fail" and "ahead" in check.detail


def test_a_node_that_does_not_answer_fails_only_who_needs_it(home: Path) -> None:
    home.mkdir()
    (home / "nodes.toml").write_text('[nodes.box]\nhost = "127.0.0.1"\nport = 9\n')
    assert found("node box").verdict == "warn"
    assert found("node box", spec(lanes={"gpu": {"provider": "ollama", "model": "m", "node": "box"}})).verdict == "fail"


@pytest.mark.skipif(os.name != "posix", reason="modes are a POSIX matter")
def test_keys_that_others_can_read_are_told(home: Path) -> None:
    load_settings().keep_key("LAB_KEY", "k")
    assert found("keys.toml").verdict == "ok"
    (home / "keys.toml").chmod(0o644)
    assert found("keys.toml") == Check(
        "keys.toml", "fail", f"{home}/keys.toml can be read by others", f"chmod 600 {home}/keys.toml"
    )


def test_a_foreign_package_in_front_of_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[str], Path | None] = doctor._origin
    monkeypatch.setattr(doctor, "_origin", lambda name: Path("/elsewhere/config") if name == "config" else real(name))
    checks = examine(load_settings())
    assert ("hafs itself", "fail", "config comes from /elsewhere/config") in [check[:3] for check in checks]
    assert "Ollama" not in [check.name for check in checks]
