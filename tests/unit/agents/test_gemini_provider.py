import json
from typing import Any

import anyio
import pytest

from agents.providers.gemini import GeminiProvider, thinking
from agents.task import Sampling, Usage
from config.contracts.sample import Message
from config.errors import (
    AuthFailed,
    BadRequest,
    Blocked,
    ModelMissing,
    Overloaded,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
)

MODEL = "gemini-2.5-flash"
SSE = {"Content-Type": "text/event-stream"}
QUESTION = [
    Message(role="system", content="Answer briefly."),
    Message(role="user", content="Hello"),
    Message(role="assistant", content="Hi."),
    Message(role="user", content="What is the capital of France?"),
]


def reply(finish: str | None = "STOP", *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": list(parts) or [{"text": "Paris."}]}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    usage = {"promptTokenCount": 20, "candidatesTokenCount": 3, "thoughtsTokenCount": 5, "cachedContentTokenCount": 4}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": MODEL, **more}


def quota(quota_id: str, delay: str) -> dict[str, Any]:
    details = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota_id}]},
        {"@type": "type.googleapis.com/google.rpc.Help", "links": []},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay},
    ]
    return {"error": {"code": 429, "message": "You exceeded your quota", "status": "RESOURCE_EXHAUSTED", "details": details}}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "the-key")
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)


def generate(server: Any, sampling: Sampling | None = None, **settings: Any) -> Any:
    wanted = sampling or Sampling()
    return anyio.run(
        server.ask, lambda url: GeminiProvider(base_url=url, **settings), lambda p: p.generate(MODEL, QUESTION, wanted)
    )


def stream(server: Any) -> list[str]:
    async def pieces(provider: Any) -> list[str]:
        return [piece async for piece in provider.stream(MODEL, QUESTION, Sampling())]

    return anyio.run(server.ask, lambda url: GeminiProvider(base_url=url), pieces)


def events(*replies: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\r\n\r\n" for each in replies)


def test_what_is_sent_and_what_comes_back(canned: Any) -> None:
    thought = {"text": "They ask for a capital.", "thought": True}
    server = canned(reply("STOP", thought, {"text": "Par"}, {"text": "is."}))
    completion = generate(server, Sampling(temperature=0.2, top_p=0.9, max_tokens=40, seed=7))
    sent = server.requests[0]
    assert server.paths[0] == f"/v1beta/models/{MODEL}:generateContent"
    assert server.headers[0]["x-goog-api-key"] == "the-key"
    assert [content["role"] for content in sent["contents"]] == ["user", "model", "user"]
    assert sent["systemInstruction"]["parts"] == [{"text": "Answer briefly."}]
    config = sent["generationConfig"]
    assert (config["temperature"], config["topP"], config["maxOutputTokens"], config["seed"]) == (0.2, 0.9, 40, 7)
    assert config["thinkingConfig"] == {"thinkingBudget": 0}
    assert (completion.text, completion.finish_reason, completion.model) == ("Paris.", "stop", MODEL)
    assert completion.usage == Usage(prompt_tokens=20, completion_tokens=3, thinking_tokens=5, cached_tokens=4)


@pytest.mark.parametrize(
    ("model", "budget", "sent"),
    [
        ("gemini-2.5-flash", None, {"thinkingBudget": 0}),
        ("gemini-2.5-flash-lite", None, {"thinkingBudget": 0}),
        ("gemini-2.5-pro", None, {"thinkingBudget": 128}),
        ("gemini-3-flash-preview", None, {"thinkingLevel": "MINIMAL"}),
        ("models/gemini-3-pro-preview", None, {"thinkingLevel": "LOW"}),
        ("gemini-2.5-flash", 512, {"thinkingBudget": 512}),
        ("gemini-3-flash-preview", -1, {"thinkingBudget": -1}),
    ],
)
def test_as_little_thinking_as_the_model_allows(model: str, budget: int | None, sent: dict[str, Any]) -> None:
    assert thinking(model, budget) == sent


def test_a_model_that_does_not_think_is_told_nothing() -> None:
    assert thinking("gemini-2.0-flash", None) is None


@pytest.mark.parametrize(("reason", "finish"), [("MAX_TOKENS", "length"), ("OTHER", "other"), ("MALFORMED_RESPONSE", "other")])
def test_finish_reasons(canned: Any, reason: str, finish: str) -> None:
    completion = generate(canned(reply(reason)))
    assert (completion.finish_reason, completion.detail) == (finish, reason)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (reply("SAFETY"), "SAFETY"),
        (reply("RECITATION"), "RECITATION"),
        (
            {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 20}},
            "PROHIBITED_CONTENT",
        ),
    ],
)
def test_a_block_is_returned_with_its_reason_and_what_it_cost(canned: Any, body: dict[str, Any], why: str) -> None:
    completion = generate(canned(body))
    assert (completion.finish_reason, completion.detail) == ("blocked", why)
    assert completion.usage.prompt_tokens == 20


SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}}'


def test_a_schema_is_asked_for_and_its_json_is_looked_at(canned: Any) -> None:
    whole = canned(reply("STOP", {"text": '{"city": "Paris"}'}))
    assert generate(whole, Sampling(schema=SCHEMA)).finish_reason == "stop"
    config = whole.requests[0]["generationConfig"]
    assert config["responseMimeType"] == "application/json" and config["responseJsonSchema"] == json.loads(SCHEMA)
    completion = generate(canned(reply("STOP", {"text": '{"city": "Par'})), Sampling(schema=SCHEMA))
    assert (completion.finish_reason, completion.detail) == ("other", "invalid JSON")
    cut = generate(canned(reply("MAX_TOKENS", {"text": '{"city": "Par'})), Sampling(schema=SCHEMA))
    assert (cut.finish_reason, cut.detail) == ("length", "MAX_TOKENS")


def test_with_an_idle_timeout_the_answer_is_put_together(canned: Any) -> None:
    server = canned(events(reply(None, {"text": "Pa"}), reply("STOP", {"text": "ris."})), headers=SSE)
    completion = generate(server, idle_timeout_s=5)
    assert "streamGenerateContent" in server.paths[0]
    assert (completion.text, completion.finish_reason) == ("Paris.", "stop")
    assert completion.usage == Usage(prompt_tokens=20, completion_tokens=3, thinking_tokens=5, cached_tokens=4)


@pytest.mark.parametrize("tail", [b"", b'data: {"candid', b'data: {"error": {"code": 503, "message": "overloaded"}}\n\n'])
def test_with_an_idle_timeout_half_an_answer_is_none(canned: Any, tail: bytes) -> None:
    with pytest.raises(ProviderUnavailable) as raised:
        generate(canned(events(reply(None)) + tail, headers=SSE), idle_timeout_s=5)
    assert raised.value.billable


@pytest.mark.parametrize("body", [reply(None), {}, {"candidates": []}])
def test_no_finish_reason_is_no_answer(canned: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ProviderUnavailable, match="without a finish reason"):
        generate(canned(body))


def test_quota_a_minute_and_quota_a_day(canned: Any) -> None:
    with pytest.raises(RateLimited) as minute:
        generate(canned(quota("GenerateRequestsPerMinutePerProjectPerModel", "34.5s"), status=429))
    assert (minute.value.retry_after_s, minute.value.per_day) == (34.5, False)
    with pytest.raises(RateLimited) as day:
        generate(canned(quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "9s"), status=429))
    assert day.value.per_day and "midnight" in day.value.hint


@pytest.mark.parametrize("details", [None, "text", [1, None], [{"retryDelay": "soon"}], [{"violations": [7]}]])
def test_an_odd_429_is_still_a_429(canned: Any, details: Any) -> None:
    body = {"error": {"code": 429, "message": "no", "status": "RESOURCE_EXHAUSTED", "details": details}}
    with pytest.raises(RateLimited) as raised:
        generate(canned(body, status=429))
    assert raised.value.retry_after_s is None and not raised.value.per_day


@pytest.mark.parametrize(
    ("status", "detail", "error"),
    [
        (400, {"reason": "API_KEY_INVALID"}, AuthFailed),
        (400, {}, BadRequest),
        (403, {}, AuthFailed),
        (404, {}, BadRequest),
        (408, {}, ProviderUnavailable),
        (500, {}, ProviderUnavailable),
        (503, {"retryDelay": "2s"}, Overloaded),
    ],
)
def test_statuses(canned: Any, status: int, detail: dict[str, Any], error: type[ProviderError]) -> None:
    body = {"error": {"code": status, "message": "the reason", "status": "X", "details": [detail]}}
    server = canned(body, status=status)
    with pytest.raises(error, match="the reason") as raised:
        generate(server)
    assert type(raised.value) is error
    assert len(server.requests) == 1  # waiting is the scheduler's work
    if isinstance(raised.value, ProviderUnavailable):
        assert not raised.value.billable
        assert raised.value.retry_after_s == (2 if detail else None)


def test_a_missing_model(canned: Any) -> None:
    message = "models/gemini-9 is not found for API version v1beta, or is not supported for generateContent."
    with pytest.raises(ModelMissing, match="gemini-9") as raised:
        generate(canned({"error": {"code": 404, "message": message, "status": "NOT_FOUND"}}, status=404))
    assert raised.value.hint


@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"[]", b"[1]", b'"text"', b'{"candidates": 7}'])
def test_what_is_no_gemini_is_unavailable(canned: Any, body: bytes) -> None:
    with pytest.raises(ProviderUnavailable):
        generate(canned(body))


def test_a_stream(canned: Any) -> None:
    server = canned(events(reply(None, {"text": "Pa"}), reply("STOP", {"text": "ris."})))
    assert stream(server) == ["Pa", "ris."]


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ([reply(None)], ProviderUnavailable),
        ([], ProviderUnavailable),
        ([reply(None), reply("MAX_TOKENS")], ProviderError),
        ([reply(None), reply("SAFETY")], Blocked),
    ],
)
def test_a_stream_that_does_not_end_well_raises(canned: Any, replies: list[Any], error: type[ProviderError]) -> None:
    with pytest.raises(error):
        stream(canned(events(*replies), headers=SSE))


def test_without_a_key_it_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMINI_API_KEY")
    with pytest.raises(AuthFailed, match="GEMINI_API_KEY or GOOGLE_API_KEY is not set"):
        GeminiProvider()


def test_a_key_of_its_own(canned: Any) -> None:
    server = canned(reply())
    generate(server, api_key=" given-key\n")
    assert server.headers[0]["x-goog-api-key"] == "given-key"
    with pytest.raises(AuthFailed, match="no key"):
        GeminiProvider(api_key="")


def test_either_variable_will_do(canned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMINI_API_KEY")
    monkeypatch.setenv("GOOGLE_API_KEY", "other-key")
    server = canned(reply())
    generate(server)
    assert server.headers[0]["x-goog-api-key"] == "other-key"


def test_the_list_of_models_is_read_to_its_end(canned: Any) -> None:
    server = canned({"models": [{"name": "models/gemini-2.5-flash"}], "nextPageToken": "a/b"}, {"models": [{"name": "models/x"}]})
    assert anyio.run(server.ask, lambda url: GeminiProvider(base_url=url), lambda p: p.models()) == [MODEL, "x"]
    assert server.asked[-1] == {"pageSize": "1000", "pageToken": "a/b"}


def test_a_stream_that_fails_at_once_wraps_its_error_in_a_list(canned: Any) -> None:
    with pytest.raises(AuthFailed, match="the reason"):
        stream(canned([{"error": {"code": 403, "message": "the reason", "status": "PERMISSION_DENIED"}}], status=403))
