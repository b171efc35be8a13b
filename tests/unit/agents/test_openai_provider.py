import json
import logging
from typing import Any

import anyio
import pytest

from agents.providers.openai_compatible import OpenAIProvider
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

QUESTION = [Message(role="system", content="Answer briefly."), Message(role="user", content="What is the capital of France?")]
USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
SSE = {"Content-Type": "text/event-stream"}
SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}}'


def reply(finish: str | None = "stop", text: str | None = "Paris.", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return {"id": "x", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": USAGE}


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "model": "m-1", **more}


def events(*chunks: dict[str, Any], end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b": hello\n\n" + b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks) + end


WHOLE = (chunk(""), chunk("Pa"), chunk("ris."), chunk(None, "stop"), {"choices": [], "usage": USAGE})


def refusal(message: str, code: str | None = None, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code, **more}}


def generate(server: Any, sampling: Sampling | None = None, times: int = 1, **settings: Any) -> Any:
    wanted = sampling or Sampling()

    async def ask(provider: OpenAIProvider) -> Any:
        return [await provider.generate("m", QUESTION, wanted) for _ in range(times)][-1]

    return anyio.run(server.ask, lambda url: OpenAIProvider(f"{url}/v1", **settings), ask)


def stream(server: Any) -> list[str]:
    async def pieces(provider: OpenAIProvider) -> list[str]:
        return [piece async for piece in provider.stream("m", QUESTION, Sampling())]

    return anyio.run(server.ask, lambda url: OpenAIProvider(f"{url}/v1"), pieces)


def test_what_is_sent_and_what_comes_back(canned: Any) -> None:
    server = canned(reply())
    completion = generate(server, Sampling(temperature=0.2, top_p=0.9, max_tokens=40, seed=7), api_key="the-key")
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == "Bearer the-key"
    options = {"max_tokens": 40, "temperature": 0.2, "top_p": 0.9, "seed": 7, "stream": False}
    assert server.requests[0] == {"model": "m", "messages": [message.model_dump() for message in QUESTION], **options}
    assert (completion.text, completion.finish_reason, completion.model) == ("Paris.", "stop", "m-1")
    assert completion.usage == Usage(prompt_tokens=20, completion_tokens=3, thinking_tokens=5, cached_tokens=4)


def test_without_a_key_and_a_seed_none_is_sent(canned: Any) -> None:
    server = canned(reply())
    generate(server)
    assert "authorization" not in server.headers[0] and "seed" not in server.requests[0]


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": None}])
def test_details_of_the_usage_may_be_missing(canned: Any, usage: Any) -> None:
    expected = Usage(prompt_tokens=2, completion_tokens=3) if usage else Usage()
    assert generate(canned({**reply(), "usage": usage})).usage == expected


@pytest.mark.parametrize(
    ("body", "finish", "detail"),
    [
        (reply("length"), "length", "length"),
        (reply("tool_calls"), "other", "tool_calls"),
        (reply("content_filter", None), "blocked", "content_filter"),
        (reply("stop", None, refusal="I cannot help with that."), "blocked", "I cannot help with that."),
    ],
)
def test_finish_reasons(canned: Any, body: dict[str, Any], finish: str, detail: str) -> None:
    completion = generate(canned(body))
    assert (completion.finish_reason, completion.detail) == (finish, detail)
    assert completion.usage.prompt_tokens == 20


def test_a_filter_before_the_model_is_a_block_too(canned: Any) -> None:
    completion = generate(canned(refusal("The prompt was filtered.", "content_filter"), status=400))
    assert completion.finish_reason == "blocked" and "filtered" in completion.detail


@pytest.mark.parametrize("body", [reply(None), {"choices": []}, {}])
def test_no_finish_reason_is_no_answer(canned: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ProviderUnavailable, match="without a finish reason") as raised:
        generate(canned(body))
    assert raised.value.billable


def test_a_schema_is_asked_for_and_its_json_is_looked_at(canned: Any) -> None:
    whole = canned(reply("stop", '{"city": "Paris"}'))
    assert generate(whole, Sampling(schema=SCHEMA)).finish_reason == "stop"
    wanted = whole.requests[0]["response_format"]
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"] == {"name": "answer", "strict": True, "schema": json.loads(SCHEMA)}
    completion = generate(canned(reply("stop", '{"city": "Par')), Sampling(schema=SCHEMA))
    assert (completion.finish_reason, completion.detail) == ("other", "invalid JSON")


def test_what_a_model_refuses_to_be_told_is_left_out_from_then_on(canned: Any, caplog: pytest.LogCaptureFixture) -> None:
    limit = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    warm = "Unsupported value: 'temperature' does not support 0.4 with this model. Only the default (1) value is supported."
    first = refusal(limit, "unsupported_parameter", param="max_tokens")
    second = refusal(warm, "unsupported_value", param="temperature")
    server = canned(first, second, status=400)
    server._answers += canned(reply(), reply())._answers
    with caplog.at_level(logging.WARNING):
        assert generate(server, times=2).text == "Paris."
    sent = server.requests
    assert len(sent) == 4
    assert sent[1]["max_completion_tokens"] == sent[0]["max_tokens"] and "max_tokens" not in sent[1]
    assert "temperature" in sent[1] and "temperature" not in sent[2]
    assert sent[3] == sent[2]
    assert [record.args[1] for record in caplog.records if isinstance(record.args, tuple)] == ["max_tokens", "temperature"]


def test_calls_at_once_may_all_be_refused_the_same(canned: Any) -> None:
    answer = refusal("Unsupported parameter", "unsupported_parameter", param="max_tokens")
    server = canned(answer, answer, status=400)
    server._answers += canned(reply(), reply())._answers
    texts: list[str] = []

    async def ask(provider: OpenAIProvider) -> None:
        async def one() -> None:
            texts.append((await provider.generate("m", QUESTION, Sampling())).text)

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            group.start_soon(one)

    anyio.run(server.ask, lambda url: OpenAIProvider(f"{url}/v1"), ask)
    assert texts == ["Paris.", "Paris."]


def test_a_model_that_refuses_it_still_is_not_asked_for_ever(canned: Any) -> None:
    answer = refusal("Unsupported parameter", "unsupported_parameter", param="max_tokens")
    server = canned(answer, answer, status=400)
    with pytest.raises(BadRequest, match="Unsupported parameter"):
        generate(server)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, refusal("Incorrect API key provided: the-key", "invalid_api_key"), AuthFailed),
        (402, {"error": {"message": "Insufficient Balance"}}, AuthFailed),
        (403, refusal("Country not supported"), AuthFailed),
        (404, refusal("The model `m` does not exist", "model_not_found"), ModelMissing),
        (404, {"object": "error", "message": "The model `m` does not exist.", "code": 404}, ModelMissing),
        (404, {"detail": "Not Found"}, BadRequest),
        (400, refusal("This model's maximum context length is 512 tokens", "context_length_exceeded"), BadRequest),
        (422, {"error": "Input should be a valid number"}, BadRequest),
        (307, {}, BadRequest),
        (408, {}, ProviderUnavailable),
        (500, refusal("The server had an error"), ProviderUnavailable),
        (503, {"error": "Loading model"}, Overloaded),
        (429, refusal("Rate limit reached for requests", "rate_limit_exceeded"), RateLimited),
        (429, refusal("You exceeded your current quota, check your plan", "insufficient_quota"), AuthFailed),
    ],
)
@pytest.mark.parametrize("ask", [generate, stream])
def test_statuses(canned: Any, ask: Any, status: int, body: dict[str, Any], error: type[ProviderError]) -> None:
    server = canned(body, status=status)
    with pytest.raises(error, match="http://127.0.0.1:") as raised:
        ask(server)
    assert type(raised.value) is error
    assert len(server.requests) == 1
    if isinstance(raised.value, ProviderUnavailable):
        assert not raised.value.billable


@pytest.mark.parametrize(
    ("message", "headers", "wait_s"),
    [
        ("slow down", {"Retry-After": "3"}, 3.0),
        ("slow down", {"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ("Rate limit reached. Please try again in 20s.", {}, 20.0),
        ("Rate limit reached. Please try again in 1m2.5s.", {}, 62.5),
        ("Rate limit reached. Please try again in 120ms.", {}, 0.12),
        ("Rate limit reached. Please try again in 2h3m.", {}, 7380.0),
        ("slow down", {}, None),
    ],
)
def test_how_long_to_wait(canned: Any, message: str, headers: dict[str, str], wait_s: float | None) -> None:
    with pytest.raises(RateLimited) as raised:
        generate(canned(refusal(message), status=429, headers=headers))
    assert raised.value.retry_after_s == wait_s and not raised.value.per_day


def test_a_quota_a_day_that_says_when_it_has_room_again_is_waited_for_no_longer(canned: Any) -> None:
    message = "Rate limit reached for m on requests per day (RPD): Limit 200, Used 200."
    with pytest.raises(RateLimited) as raised:
        generate(canned(refusal(message, "rate_limit_exceeded"), status=429))
    assert raised.value.per_day
    with pytest.raises(RateLimited) as raised:
        generate(canned(refusal(f"{message} Please try again in 7m12s.", "rate_limit_exceeded"), status=429))
    assert raised.value.retry_after_s == 432 and not raised.value.per_day


def test_a_message_of_the_server_is_clipped(canned: Any) -> None:
    with pytest.raises(ProviderUnavailable) as raised:
        generate(canned(refusal("boom " * 1000), status=500))
    assert "boom" in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"[]", b'"text"', b'{"choices": 7}', b'{"choices": [{"mess'])
def test_what_is_no_openai_is_unavailable(canned: Any, body: bytes) -> None:
    with pytest.raises(ProviderUnavailable, match="does not answer as OpenAI does"):
        generate(canned(body))


def test_an_error_that_comes_with_200(canned: Any) -> None:
    with pytest.raises(RateLimited, match="upstream is busy"):
        generate(canned({"error": {"message": "upstream is busy", "code": 429}}))


def test_a_stream(canned: Any) -> None:
    assert stream(canned(events(*WHOLE), headers=SSE)) == ["Pa", "ris."]


def test_with_an_idle_timeout_the_answer_is_put_together(canned: Any) -> None:
    server = canned(events(*WHOLE), headers=SSE)
    completion = generate(server, idle_timeout_s=5)
    assert server.requests[0]["stream"] is True and server.requests[0]["stream_options"] == {"include_usage": True}
    assert (completion.text, completion.finish_reason) == ("Paris.", "stop")
    assert completion.usage == Usage(prompt_tokens=20, completion_tokens=3, thinking_tokens=5, cached_tokens=4)


@pytest.mark.parametrize("tail", [b"", b'data: {"choi', b'data: {"error": {"code": 503, "message": "overloaded"}}\n\n'])
@pytest.mark.parametrize("ask", [stream, lambda server: generate(server, idle_timeout_s=5)])
def test_half_an_answer_is_none(canned: Any, ask: Any, tail: bytes) -> None:
    with pytest.raises(ProviderUnavailable) as raised:
        ask(canned(events(chunk("Pa"), end=tail), headers=SSE))
    assert raised.value.billable


@pytest.mark.parametrize(
    ("last", "error"),
    [(chunk(None, "length"), ProviderError), (chunk(None, "content_filter"), Blocked), (chunk(), ProviderUnavailable)],
)
def test_a_stream_that_does_not_end_well_raises(canned: Any, last: dict[str, Any], error: type[ProviderError]) -> None:
    with pytest.raises(error):
        stream(canned(events(chunk("Pa"), last), headers=SSE))


def test_models(canned: Any) -> None:
    server = canned({"object": "list", "data": [{"id": "a"}, {"id": "b", "object": "model"}]})
    assert anyio.run(server.ask, lambda url: OpenAIProvider(f"{url}/v1/"), lambda provider: provider.models()) == ["a", "b"]
    assert server.paths == ["/v1/models"]
