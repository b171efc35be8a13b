"""`hafs serve` as a process with a fake model behind it: OpenAI's words, keys, errors, clients that leave, a server that dies."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from campaigns.serve_api import MAX_BODY_BYTES
from tests.fakes.served import served
from tests.fakes.waiting import wait_for

pytestmark = pytest.mark.integration
KEY = "sk-hafs-1"
HI = {"messages": [{"role": "user", "content": "say hi"}]}


@contextmanager
def serving(*arguments: str) -> Iterator[httpx.Client]:
    """A client of `hafs serve` on a free port."""
    command = [sys.executable, "-P", "-m", "campaigns.cli.main", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            found = re.search(r"http://[^:]+:\d+", line)
            assert found, line
            url = re.sub(r"//[^:]+", "//127.0.0.1", found[0])
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                yield client
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served("talking_ollama", tmp_path_factory.mktemp("model"), PIECE_S="0.02", WORDS="4") as url:
        yield url


@pytest.fixture(scope="module")
def client(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAFS_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("HAFS_RUNTIME", raising=False)
        patch.setenv("OLLAMA_HOST", model)
        with serving() as client:
            yield client


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={**HI, **body})


def events(answer: httpx.Response) -> list[Any]:
    found = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def options(model: str) -> Any:
    return httpx.get(f"{model}/witness").json()["asked"][-1]


def test_an_answer_in_the_words_of_openai(client: httpx.Client, model: str) -> None:
    answer = ask(client, model="hafs-coder", temperature=0.5, max_completion_tokens=9, stop="x", seed=3, user="me", n=1, tools=[])
    body = answer.json()
    assert body["object"] == "chat.completion" and body["model"] == "hafs-coder:latest" and body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi hi hi hi "}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    sent = options(model)["options"]
    assert (sent["temperature"], sent["num_predict"], sent["stop"], sent["seed"]) == (0.5, 9, ["x"], 3)
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "yes"}]
    schema = {"type": "object", "properties": {}}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    developed = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    refused = ask(client, messages=developed, response_format=wanted)
    assert refused.status_code == 502 and "invalid JSON" in refused.json()["error"]["message"], "the fake knows no schema"
    assert options(model)["format"] == schema
    assert options(model)["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "say yes"}]


def test_a_stream_of_events(client: httpx.Client) -> None:
    *pieces, last, usage, done = events(ask(client, stream=True, max_tokens=3, stream_options={"include_usage": True}))
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [piece["choices"][0]["delta"]["content"] for piece in pieces[1:]] == ["hi "] * 3
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert len({piece["id"] for piece in [*pieces, last, usage]}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_a_status_and_a_name(client: httpx.Client, stream: bool) -> None:
    def failed(**body: Any) -> tuple[int, Any]:
        answer = ask(client, stream=stream, **body)
        return answer.status_code, answer.json()["error"]

    assert failed(messages=[])[0] == 400
    status, error = failed(messages=[{"role": "robot", "content": "x"}])
    assert status == 400 and error["param"] == "messages.0.role"
    status, error = failed(n=2)
    assert (status, error["param"]) == (400, "n") and "not supported" in error["message"]
    assert failed(tools=[{"type": "function"}])[1]["param"] == "tools"
    status, error = failed(model="gpt-4o")
    assert status == 404 and "hafs-coder:latest" in error["message"]
    assert failed(messages=[{"role": "user", "content": "so wrong"}])[0] == 400
    status, error = failed(messages=[{"role": "user", "content": "word " * 5000}])
    assert (status, error["param"]) == (400, "num_ctx") and "5000" in error["message"] and "4096" in error["message"]


def test_an_error_in_the_middle_ends_the_stream_without_its_end_mark(client: httpx.Client) -> None:
    broken = {"messages": [{"role": "user", "content": "be broken"}]}
    told = events(client.post("/v1/chat/completions", json={**broken, "stream": True}))
    assert "out of memory" in told[-1]["error"]["message"] and told[1]["choices"][0]["delta"]["content"] == "broken "
    assert client.post("/v1/chat/completions", json=broken).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_stops_the_answer(client: httpx.Client, model: str, stream: bool) -> None:
    before = len(httpx.get(f"{model}/witness").json()["left"])
    body = {"messages": [{"role": "user", "content": "talk for long"}], "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        with client.stream("POST", "/v1/chat/completions", json=body, timeout=0.5) as answer:
            for _ in answer.iter_raw():
                if b"long" in _:
                    raise httpx.ReadTimeout("the client has enough")
    wait_for("the model to stop", lambda: len(httpx.get(f"{model}/witness").json()["left"]) > before)
    assert httpx.get(f"{model}/witness").json()["left"][-1].count("long ") < 400


def test_models_health_and_a_docs_page_without_the_internet(client: httpx.Client) -> None:
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["hafs-coder:latest"]
    assert client.get("/health").json() == {"status": "ok", "model": "hafs-coder:latest"}
    page = client.get("/docs").text
    assert "https://" not in page
    for asset in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert client.get(asset).status_code == 200, asset
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}])
def test_without_a_key_only_this_machine_is_served(client: httpx.Client, headers: dict[str, str]) -> None:
    assert client.get("/v1/models", headers=headers).status_code == 403
    assert client.get("/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200


def test_with_a_key_nobody_is_served_without(model: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAFS_RUNTIME")
    monkeypatch.setenv("OLLAMA_HOST", model)
    home.mkdir(exist_ok=True)
    (home / "keys.toml").write_text(f'[keys]\nHAFS_API_KEY = "{KEY}"\n')
    with serving("--host", "0.0.0.0") as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            refused = client.post("/v1/chat/completions", json=HI, headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert client.post("/v1/chat/completions", content=b"{", headers=headers).status_code == 401, "its body is not read"
        good = {"Authorization": f"Bearer {KEY}", "Host": "box.example"}
        assert client.post("/v1/chat/completions", json=HI, headers=good).status_code == 200


def test_a_server_that_ended_and_came_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAFS_RUNTIME")
    with served("talking_ollama", tmp_path, PIECE_S="0.01") as model:
        monkeypatch.setenv("OLLAMA_HOST", model)
        with serving() as client:
            with pytest.raises(httpx.HTTPError):
                client.post(
                    "/v1/chat/completions", json={"messages": [{"role": "user", "content": "now die"}]}
                ).raise_for_status()
            assert client.get("/health").status_code == 503
            assert "no Ollama answers there" in ask(client).json()["error"]["message"]
            (tmp_path / "again").mkdir()
            with served("talking_ollama", tmp_path / "again", PORT=model.rpartition(":")[2], PIECE_S="0.01"):
                assert ask(client).json()["choices"][0]["message"]["content"] == "hi " * 5


def test_what_cannot_be_served_is_refused_before_anything_starts(home: Path) -> None:
    def refused(*arguments: str, **environment: str) -> tuple[int, str]:
        command = [sys.executable, "-P", "-m", "campaigns.cli.main", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
        return done.returncode, done.stderr

    code, told = refused("--host", "0.0.0.0")
    assert code == 3 and "HAFS_API_KEY" in told and not home.exists()
    assert refused("--host", "0.0.0.0", HAFS_API_KEY="two words")[0] == 3
    code, told = refused("--host", "192.0.2.1", "--api-key", KEY)
    assert code == 3 and "cannot listen on 192.0.2.1" in told and KEY not in told


def test_an_answer_under_way_outlives_the_search_for_the_server(client: httpx.Client, model: str) -> None:
    body = {"messages": [{"role": "user", "content": "talk for long"}], "stream": True, "max_tokens": 60}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"long ' in line)
        failed = ask(client, messages=[{"role": "user", "content": "be down"}])
        assert failed.status_code == 503 and "no memory" in failed.json()["error"]["message"]
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]" and '"finish_reason": "length"' in told[-2]
    assert sum('"long ' in line for line in told) > 40


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_before_the_first_word_stops_the_answer(client: httpx.Client, model: str, stream: bool) -> None:
    def left() -> list[str]:
        found: list[str] = httpx.get(f"{model}/witness").json()["left"]
        return found

    before = len(left())
    body = {"messages": [{"role": "user", "content": "think first"}], "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=0.5)
    wait_for("the model to stop", lambda: len(left()) > before, 5)
    assert left()[-1] == "", "it had not said a word yet"


def test_every_error_is_in_the_words_of_openai(client: httpx.Client) -> None:
    def failed(method: str, path: str, content: bytes = b"") -> tuple[int, Any]:
        answer = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
        return answer.status_code, answer.json()["error"]

    assert failed("POST", "/v1/completions", b"{}")[0] == 404
    assert failed("GET", "/v1/chat/completions")[0] == 405
    status, error = failed("POST", "/v1/chat/completions", b'{"messages": [')
    assert status == 400 and error["param"] is None and "no JSON" in error["message"] and "14" in error["message"]
    assert failed("POST", "/v1/chat/completions", b'{"messages": "\xff"}')[0] == 400


def test_a_body_that_is_no_conversation_any_more_is_not_read(client: httpx.Client) -> None:
    size = MAX_BODY_BYTES + 1
    for content in (b"x" * size, iter([b"x" * (size // 2)] * 3)):  # with its length said before, and without
        answer = httpx.post(
            f"{client.base_url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413 and str(MAX_BODY_BYTES) in answer.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{"Host": "[::1"}, {"Origin": "http://[x"}])
def test_a_header_that_is_no_address_is_refused(client: httpx.Client, headers: dict[str, str]) -> None:
    assert httpx.get(f"{client.base_url}/v1/models", headers=headers).status_code == 403


def test_any_loopback_address_can_be_used_without_a_key(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAFS_RUNTIME")
    monkeypatch.setenv("OLLAMA_HOST", model)
    with serving("--host", "127.9.9.9") as client:
        answer = httpx.get(f"http://127.9.9.9:{client.base_url.port}/v1/models", trust_env=False)
        assert answer.status_code == 200


VANISHING = """
from contextlib import suppress
import httpx
from campaigns.cli import main, render
LIMITS = {"num_ctx": 99, "num_predict": 9}
DEADLY = {"model": "hafs-coder", "messages": [{"role": "user", "content": "now die"}], "options": LIMITS}
def serving(url, model, with_key):
    with suppress(httpx.HTTPError):
        httpx.post("MODEL/api/chat", json=DEADLY)
render.serving = serving
main.main()
"""


def test_a_model_server_that_ends_before_the_start_is_our_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAFS_RUNTIME")
    with served("talking_ollama", tmp_path, PIECE_S="0.01") as model:
        monkeypatch.setenv("OLLAMA_HOST", model)
        command = [sys.executable, "-P", "-c", VANISHING.replace("MODEL", model), "serve", "--port", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 11, done.stderr
    assert done.stderr.startswith("error: local: no Ollama answers there\n") and "Traceback" not in done.stderr
