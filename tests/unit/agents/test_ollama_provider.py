"""Answers marked "recorded" are those of a real Ollama server (0.33)."""

import json
from typing import Any

import anyio
import pytest

from agents.providers.ollama import OllamaProvider, PullProgress
from agents.task import Sampling, Usage
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ModelMissing, Overloaded, ProviderError, ProviderUnavailable, RateLimited

QUESTION = [Message(role="system", content="Answer briefly."), Message(role="user", content="What is the capital of France?")]
RECORDED = {
    "model": "base",
    "created_at": "2026-11-21T09:01:58.068269884Z",
    "message": {"role": "assistant", "content": "The capital of France is Paris."},
    "done": True,
    "done_reason": "stop",
    "total_duration": 90121561,
    "load_duration": 2571996,
    "prompt_eval_count": 16,
    "prompt_eval_duration": 1,
    "eval_count": 8,
    "eval_duration": 1,
}


SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'


def generate(
    server: Any, messages: list[Message] = QUESTION, sampling: Sampling | None = None, idle_timeout_s: float | None = None
) -> Any:
    wanted = sampling or Sampling()
    return anyio.run(
        server.ask,
        lambda url: OllamaProvider(url, idle_timeout_s=idle_timeout_s),
        lambda provider: provider.generate("base", messages, wanted),
    )


def stream(server: Any, messages: list[Message] = QUESTION) -> list[str]:
    async def pieces(provider: OllamaProvider) -> list[str]:
        return [piece async for piece in provider.stream("base", messages, Sampling())]

    return anyio.run(server.ask, OllamaProvider, pieces)


def ndjson(*parts: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(part).encode() + b"\n" for part in parts)


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "base", "created_at": "x", "message": {"role": "assistant", "content": text}, "done": False, **more}


def test_what_is_sent_and_what_comes_back(canned: Any) -> None:
    server = canned(RECORDED)
    completion = generate(server, sampling=Sampling(temperature=0.2, top_p=0.9, max_tokens=40, num_ctx=512, seed=7))
    sent = server.requests[0]
    assert server.paths == ["/api/chat"]
    assert sent["options"] == {"temperature": 0.2, "top_p": 0.9, "num_predict": 40, "num_ctx": 512, "seed": 7}
    assert sent["messages"] == [message.model_dump() for message in QUESTION]
    assert (sent["model"], sent["stream"]) == ("base", False)
    assert (sent["truncate"], sent["shift"]) == (False, False)  # a prompt that does not fit is refused, instead of cut
    assert (completion.text, completion.finish_reason, completion.model) == ("The capital of France is Paris.", "stop", "base")
    assert completion.usage == Usage(prompt_tokens=16, completion_tokens=8)
    assert completion.latency_s > 0


def test_without_a_seed_none_is_sent(canned: Any) -> None:
    server = canned(RECORDED)
    generate(server)
    assert "seed" not in server.requests[0]["options"]


@pytest.mark.parametrize(("reason", "finish"), [("stop", "stop"), ("length", "length"), ("load", "other"), ("unload", "other")])
def test_done_reasons(canned: Any, reason: str, finish: str) -> None:
    completion = generate(canned({**RECORDED, "done_reason": reason}))
    assert (completion.finish_reason, completion.detail) == (finish, "" if finish == "stop" else reason)


@pytest.mark.parametrize("change", [{"done": False}, {"done_reason": None}])
def test_an_answer_that_does_not_say_how_it_ended_is_none(canned: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ProviderUnavailable, match="did not say how its answer ended"):
        generate(canned({**RECORDED, **change}))


def test_a_prompt_that_surely_does_not_fit_is_not_sent(canned: Any) -> None:
    server = canned(RECORDED)
    with pytest.raises(BadRequest, match="at least 900 tokens, the context window num_ctx is 512"):
        generate(server, [Message(role="user", content="word " * 900)], Sampling(num_ctx=512))
    assert server.requests == []


def test_a_prompt_that_the_server_cut_is_noticed(canned: Any) -> None:
    # Recorded: 900 words into a window of 512 gave an empty answer, "stop", and a count of 258.
    cut = {**RECORDED, "message": {"role": "assistant", "content": ""}, "prompt_eval_count": 258}
    prompt = [Message(role="user", content="word " * 400)]
    completion = generate(canned(cut), prompt, Sampling(num_ctx=512))
    assert (completion.finish_reason, completion.detail) == ("other", "prompt cut")
    assert completion.usage.prompt_tokens == 258
    assert generate(canned({**cut, "prompt_eval_count": 409}), prompt, Sampling(num_ctx=512)).finish_reason == "stop"


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (404, "model 'base' not found", ModelMissing),
        (404, "404 page not found", BadRequest),
        (400, "request (8889 tokens) exceeds the available context size (4096 tokens), try increasing it", BadRequest),
        (400, '"base" does not support chat', BadRequest),
        (501, "this model does not support embeddings", BadRequest),
        (500, 'option "num_ctx" must be of type integer', BadRequest),
        (500, 'invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object', BadRequest),
        (500, "llama runner process has terminated: exit status 2", ProviderUnavailable),
        (503, "server busy, please try again.  maximum pending requests exceeded", Overloaded),
        (502, "bad gateway", ProviderUnavailable),
        (401, "unauthorized", AuthFailed),
        (429, "slow down", RateLimited),
    ],
)
@pytest.mark.parametrize("ask", [generate, stream])
def test_statuses(canned: Any, ask: Any, status: int, message: str, error: type[ProviderError]) -> None:
    with pytest.raises(error) as raised:
        ask(canned({"error": message}, status=status))
    assert type(raised.value) is error
    assert " ".join(message.split()) in str(raised.value) and "http://127.0.0.1:" in str(raised.value)
    assert raised.value.hint
    if isinstance(raised.value, ProviderUnavailable):
        assert not raised.value.billable


def test_a_missing_model_says_how_to_get_it(canned: Any) -> None:
    with pytest.raises(BadRequest) as raised:
        generate(canned({"error": "model 'base' not found"}, status=404))
    assert "ollama pull base" in raised.value.hint


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept(canned: Any, status: int) -> None:
    with pytest.raises((RateLimited, ProviderUnavailable)) as raised:
        generate(canned({"error": "busy"}, status=status, headers={"Retry-After": "3"}))
    assert raised.value.retry_after_s == 3.0


@pytest.mark.parametrize("body", [b"<html>a login page</html>", b'{"unexpected": 1}', b"[]"])
def test_what_is_no_ollama_is_unavailable(canned: Any, body: bytes) -> None:
    with pytest.raises(ProviderUnavailable):
        generate(canned(body))


def test_a_schema_is_asked_for_and_its_json_is_looked_at(canned: Any) -> None:
    whole = canned({**RECORDED, "message": {"role": "assistant", "content": '{"city": "Paris"}'}})
    assert generate(whole, sampling=Sampling(schema=SCHEMA)).finish_reason == "stop"
    assert whole.requests[0]["format"] == json.loads(SCHEMA)
    completion = generate(
        canned({**RECORDED, "message": {"role": "assistant", "content": '{"city": "Par'}}), sampling=Sampling(schema=SCHEMA)
    )
    assert (completion.finish_reason, completion.detail) == ("other", "invalid JSON")


def test_with_an_idle_timeout_the_answer_is_put_together(canned: Any) -> None:
    end = {**RECORDED, "message": {"role": "assistant", "content": ""}}
    server = canned(ndjson(part("The capital"), part(" is Paris."), end))
    completion = generate(server, idle_timeout_s=5)
    assert server.requests[0]["stream"] is True
    assert (completion.text, completion.finish_reason) == ("The capital is Paris.", "stop")
    assert completion.usage == Usage(prompt_tokens=16, completion_tokens=8)


@pytest.mark.parametrize("tail", [b"", ndjson({"error": "the runner died"}), b'{"model": "ba'])
def test_with_an_idle_timeout_half_an_answer_is_none(canned: Any, tail: bytes) -> None:
    with pytest.raises(ProviderUnavailable) as raised:
        generate(canned(ndjson(part("The cap")) + tail), idle_timeout_s=5)
    assert raised.value.billable


def pull(server: Any) -> list[PullProgress]:
    async def steps(provider: OllamaProvider) -> list[PullProgress]:
        return [step async for step in provider.pull("qwen3:4b")]

    return anyio.run(server.ask, OllamaProvider, steps)


def test_a_model_is_fetched(canned: Any) -> None:
    layer = {"status": "pulling 1", "digest": "1", "total": 9, "completed": 4}
    server = canned(ndjson({"status": "pulling manifest"}, layer, {"status": "success"}))
    assert pull(server) == [
        PullProgress("pulling manifest", 0, 0),
        PullProgress("pulling 1", 4, 9),
        PullProgress("success", 0, 0),
    ]
    assert server.paths == ["/api/pull"] and server.requests[0]["model"] == "qwen3:4b"


@pytest.mark.parametrize(
    ("tail", "error", "message"),
    [
        ({"error": "pull model manifest: file does not exist"}, ModelMissing, "manifest"),
        ({"error": "max retries exceeded: no such host"}, ProviderUnavailable, "no such host"),
        ({"status": "pulling 1"}, ProviderUnavailable, "broke off fetching qwen3:4b"),
    ],
)
def test_a_fetch_that_does_not_end_in_success_raises(canned: Any, tail: Any, error: type[ProviderError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        pull(canned(ndjson({"status": "pulling manifest"}, tail)))
    assert raised.value.hint


def test_a_stream(canned: Any) -> None:
    whole = ndjson(part("The capital"), part(" is Paris."), {**RECORDED, "message": {"role": "assistant", "content": ""}})
    assert stream(canned(whole)) == ["The capital", " is Paris."]


@pytest.mark.parametrize(
    ("tail", "error"),
    [
        (b"", ProviderUnavailable),
        (ndjson({"error": "the runner died"}), ProviderUnavailable),
        (b'{"model": "ba', ProviderUnavailable),
        (ndjson({**RECORDED, "done_reason": "length"}), ProviderError),
        (ndjson({**RECORDED, "prompt_eval_count": 1}), BadRequest),
    ],
)
def test_a_stream_that_does_not_end_well_raises(canned: Any, tail: bytes, error: type[ProviderError]) -> None:
    with pytest.raises(error):
        stream(canned(ndjson(part("The cap")) + tail))


def test_an_empty_stream_raises(canned: Any) -> None:
    with pytest.raises(ProviderUnavailable):
        stream(canned(b""))


def test_a_message_of_the_server_is_clipped(canned: Any) -> None:
    with pytest.raises(ProviderUnavailable) as raised:
        generate(canned({"error": "boom " * 1000}, status=500))
    assert len(str(raised.value)) < 400


def test_where_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "box:1234")
    assert OllamaProvider().host == "box:1234"
    assert OllamaProvider("other:1").host == "other:1"
    monkeypatch.delenv("OLLAMA_HOST")
    assert OllamaProvider().host == "http://127.0.0.1:11434"
