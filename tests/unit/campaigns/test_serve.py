"""What `hafs serve` refuses before it starts, and what it makes of a request."""

import importlib.util
from typing import Any, cast

import anyio
import httpx
import pytest

from agents.task import Sampling
from campaigns import serve_api
from campaigns.serve import ServeOptions, _bound, on_this_machine, require_extra, require_key
from campaigns.serve_api import build, status_of
from campaigns.serve_gateway import Gateway
from campaigns.serve_wire import ChatRequest
from config.errors import BadRequest, ConfigError, MissingExtra, all_errors

HI = [{"role": "user", "content": "hi"}]


def sampling(**body: Any) -> Sampling:
    return ChatRequest.model_validate({"messages": HI, **body}).sampling(2048)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        require_extra()
    assert caught.value.hint == 'pip install "hafs[serve]"'


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert on_this_machine(host)
    require_key(ServeOptions(host, 0, "", 4096))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "box", "", "localhost.evil.example"])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        require_key(ServeOptions(host, 0, "", 4096))
    require_key(ServeOptions(host, 0, "sk-1", 4096))


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_client_can_send_is_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_key(ServeOptions("127.0.0.1", 0, key, 4096))
    assert key not in str(caught.value)


def test_a_request_becomes_settings() -> None:
    assert sampling() == Sampling(0.0, 1.0, 2048, 2048)
    assert sampling(max_tokens=5, max_completion_tokens=6, stop=["a", "b"]).max_tokens == 6
    assert sampling(stop=["a", "b"]).stop == ("a", "b")
    assert sampling(response_format={"type": "json_object"}).schema == '{"type": "object"}'
    assert sampling(response_format={"type": "text"}).schema == ""


@pytest.mark.parametrize(
    "body",
    [{"n": 2}, {"tools": [{}]}, {"logprobs": True}, {"presence_penalty": 0.5}, {"functions": [{}]}, {"web_search_options": {}}],
)
def test_what_would_change_the_answer_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        sampling(**body)
    assert caught.value.parameter == next(iter(body))


def test_what_asks_for_nothing_is_taken() -> None:
    assert sampling(
        n=1, tools=[], tool_choice="auto", logprobs=False, presence_penalty=0, user="me", metadata={"a": 1}, audio=None
    )


def test_null_is_what_is_not_said() -> None:
    assert sampling(temperature=None, top_p=None, max_tokens=None, stop=None, seed=None, n=None) == sampling()
    assert not ChatRequest.model_validate({"messages": HI, "stream": None}).stream
    assert sampling(temperature=0.0).temperature == 0.0 and sampling(temperature=0.7, top_p=0.3).top_p == 0.3


def test_an_empty_stop_does_not_end_every_answer() -> None:
    assert sampling(stop="").stop == () and sampling(stop=["", "END"]).stop == ("END",)


def test_a_host_that_no_name_can_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="no host has such a name"):
        _bound(f"{'x' * 64}.example", 0)


def test_every_error_has_a_status_of_an_error() -> None:
    assert {status_of(error("x")) for error in all_errors()} == {400, 404, 429, 502, 503}


def test_health_does_not_wait_for_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging:
        model = "hafs-coder:latest"

        async def alive(self) -> None:
            await anyio.sleep_forever()

    monkeypatch.setattr(serve_api, "HEALTH_S", 0.1)

    async def ask() -> httpx.Response:
        app = build(cast(Gateway, Hanging()), "", 2048, "127.0.0.1")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            with anyio.fail_after(10):
                return await client.get("/health")

    answer = anyio.run(ask)
    assert answer.status_code == 503 and "within 0.1 s" in answer.json()["error"]["message"]
