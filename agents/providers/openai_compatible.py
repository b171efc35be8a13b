"""Servers that speak OpenAI's chat completions: OpenAI, vLLM, LM Studio, llama.cpp's server, and vendors that copied the API.

- An answer without a finish reason is none: ProviderUnavailable.
- What a model refuses to be told (max_tokens, temperature, …: OpenAI's newer ones do) is left out or renamed after its first
  refusal, for that model; a line in the log says so.
- An account without credit does not come back by itself: AuthFailed, which closes a lane for good.

Without OpenAI's SDK: two routes are all that is used, servers differ in what the SDK's models insist on, it would retry by itself
and take an early end of a stream for the end of the answer, and it costs a multiple of the time of a request.
"""

import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from agents.providers.transport import checked_address, checked_key, clip, decoded_schema, judged, require_whole, retry_after_s
from agents.providers.wire import Refusal, Wire
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.base import Tolerant
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

log = logging.getLogger("hafs.provider")
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "blocked"}
_OPTIONAL = ("max_tokens", "temperature", "top_p", "seed", "stream_options")
_NO_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})
_WAIT = re.compile(r"try again in (?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)(m?s))?")


class _Text(Tolerant):
    content: str | None = None
    refusal: str | None = None


class _Choice(Tolerant):
    message: _Text | None = None
    delta: _Text | None = None
    finish_reason: str | None = None


class _PromptTokens(Tolerant):
    cached_tokens: int | None = None


class _CompletionTokens(Tolerant):
    reasoning_tokens: int | None = None


class _Counted(Tolerant):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptTokens | None = None
    completion_tokens_details: _CompletionTokens | None = None


class _Part(Tolerant):
    """A whole answer, or a piece of a streamed one. The usage comes in a last piece of its own."""

    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Counted | None = None
    error: Any = None

    @property
    def said(self) -> _Text:
        choice = self.choices[0] if self.choices else _Choice()
        return choice.message or choice.delta or _Text()


class _Model(Tolerant):
    id: str


class _Models(Tolerant):
    data: list[_Model]


class OpenAIProvider:
    """A server that speaks OpenAI's chat completions.

    Args:
        base_url: what stands before /chat/completions, as a rule with /v1 at its end.
        api_key: empty: none is sent.
        idle_timeout_s: how long no piece of an answer may come once it has begun; None: answers are not streamed.

    Raises:
        AuthFailed: `api_key` holds characters that no key has.
        ConfigError: the base_url holds a password or the like.
    """

    name = "openai"

    def __init__(self, base_url: str, *, api_key: str = "", idle_timeout_s: float | None = None) -> None:
        self.host = checked_address(base_url, "the base_url")
        self._idle_timeout_s = idle_timeout_s
        self._refuses: dict[str, set[str]] = {}  # by model: parameters it will not hear of
        key = checked_key(api_key, f"the key for {base_url}")
        self._wire = Wire(
            base_url,
            name=base_url,
            api="OpenAI",
            refused=self._refused,
            hint="start the server, or check the lane's base_url",
            headers={"Authorization": f"Bearer {key}"} if key else None,
            secret=key,
            proxy=True,
        )

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        started = time.perf_counter()
        try:
            parts = [part async for part in self._parts(model, messages, sampling, streamed=self._idle_timeout_s is not None)]
        except Blocked as error:  # a filter in front of the model: there is no answer that could be returned
            return Completion("", "blocked", Usage(), model, time.perf_counter() - started, str(error))
        latency_s = time.perf_counter() - started
        text = "".join(part.said.content or "" for part in parts)
        finish, detail = judged(text, *self._ended(parts), sampling)
        named = next((part.model for part in parts if part.model), model)
        return Completion(text, finish, _usage(parts), named, latency_s, detail)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        ends: list[_Part] = []
        async for part in self._parts(model, messages, sampling, streamed=True):
            if part.said.content:
                yield part.said.content
            if part.said.refusal or (part.choices and part.choices[0].finish_reason):
                ends.append(part)
        require_whole(self.host, *self._ended(ends), sampling)

    async def models(self) -> list[str]:
        return [entry.id for entry in (await self._wire.get("/models", _Models.model_validate_json)).data]

    async def aclose(self) -> None:
        await self._wire.aclose()

    async def _parts(
        self, model: str, messages: Sequence[Message], sampling: Sampling, *, streamed: bool
    ) -> AsyncIterator[_Part]:
        """The answer; sent again without what the model has refused to be told."""
        body = {"model": model, "messages": [vars(message) for message in messages], **_options(sampling, streamed)}
        while True:
            left_out = frozenset(self._refuses.get(model, ()))
            try:
                async for part in self._sent(_without(body, left_out), streamed):
                    yield part
                return
            except BadRequest as error:
                if not error.parameter or error.parameter in left_out:
                    raise
                known = self._refuses.setdefault(model, set())
                if error.parameter not in known:  # else another call has just been told the same
                    known.add(error.parameter)
                    log.warning('model "%s" is no longer told %s, which it refused: %s', model, error.parameter, error)

    async def _sent(self, body: dict[str, Any], streamed: bool) -> AsyncIterator[_Part]:
        if not streamed:
            part = await self._wire.post("/chat/completions", body, _Part.model_validate_json)
            if part.error and not part.choices:  # some gateways tell errors with 200
                raise self._wire.error_inside({"error": part.error}, _code(part.error), begun=False)
            yield part
            return
        begun = False
        stream = self._wire.stream("/chat/completions", body, _Part.model_validate_json, self._idle_timeout_s)
        async with aclosing(stream) as parts:
            async for part in parts:
                if part.error:
                    raise self._wire.error_inside({"error": part.error}, _code(part.error), begun=begun)
                begun = True
                yield part

    def _ended(self, parts: Sequence[_Part]) -> tuple[FinishReason, str]:
        if refusal := "".join(part.said.refusal or "" for part in parts):
            return "blocked", clip(refusal)
        for part in reversed(parts):
            if reason := (part.choices and part.choices[0].finish_reason) or "":
                finish = _FINISH.get(reason, "other")
                return finish, "" if finish == "stop" else reason
        raise ProviderUnavailable(f"{self.host} ended its answer without a finish reason")

    def _refused(self, refusal: Refusal) -> ProviderError:
        error = _error_body(refusal.body)
        told, code, parameter = error.get("message"), str(error.get("code") or error.get("type") or ""), error.get("param")
        text = clip(told) if told and isinstance(told, str) else refusal.text
        what, status = f"{self.host}: {text}", refusal.status
        if status in (400, 422) and code == "content_filter":
            return Blocked(what, hint="ask in other words")
        if status in (400, 422) and (refused := _unsupported(parameter, code, text)):
            return BadRequest(what, parameter=refused, hint="check the lane's model and sampling")
        if status in (401, 402, 403) or code in _NO_CREDIT:
            return AuthFailed(what, hint="check the key of the lane (api_key_env) and the credit of its account")
        return self._by_status(what, status, code, _wait_s(refusal, text))

    def _by_status(self, what: str, status: int, code: str, wait_s: float | None) -> ProviderError:
        if status == 429:
            # A quota of a day that says when to come back is a window that slides: there is no midnight to wait for.
            per_day = wait_s is None and "per day" in what
            return RateLimited(what, retry_after_s=wait_s, per_day=per_day, hint="lower the lane's rpm or slots")
        if code == "model_not_found" or (status == 404 and "model" in what.lower()):
            return ModelMissing(what, hint="check the name of the lane's model")
        if status == 404:
            return BadRequest(what, hint="check the lane's base_url: as a rule it ends in /v1")
        if status in (503, 529):
            return Overloaded(what, retry_after_s=wait_s)
        if status == 501 or (400 <= status < 500 and status not in (408, 409)):
            return BadRequest(what, hint="check the lane's model and sampling")
        return ProviderUnavailable(what, billable=False, retry_after_s=wait_s)


def _options(sampling: Sampling, streamed: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stream": streamed,
    }
    if streamed:
        options["stream_options"] = {"include_usage": True}
    if sampling.seed is not None:
        options["seed"] = sampling.seed
    if sampling.schema:
        schema = {"name": "answer", "strict": True, "schema": decoded_schema(sampling.schema)}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    return options


def _without(body: dict[str, Any], refused: frozenset[str]) -> dict[str, Any]:
    if not refused:
        return body
    kept = {name: value for name, value in body.items() if name not in refused}
    if "max_tokens" in refused:
        kept["max_completion_tokens"] = body["max_tokens"]
    return kept


def _unsupported(parameter: object, code: str, text: str) -> str:
    """The parameter that an error complains of, if the request may do without it."""
    if not code.startswith("unsupported") and "unsupported" not in text.lower() and "not supported" not in text.lower():
        return ""
    named = parameter if isinstance(parameter, str) else next(iter(re.findall(r"'(\w+)'", text)), "")
    return named if named in _OPTIONAL else ""


def _usage(parts: Sequence[_Part]) -> Usage:
    counted = next((part.usage for part in reversed(parts) if part.usage), _Counted())
    cached = counted.prompt_tokens_details.cached_tokens if counted.prompt_tokens_details else None
    reasoning = counted.completion_tokens_details.reasoning_tokens if counted.completion_tokens_details else None
    thinking = reasoning or 0
    return Usage(
        prompt_tokens=counted.prompt_tokens or 0,
        completion_tokens=max(0, (counted.completion_tokens or 0) - thinking),  # OpenAI counts reasoning within
        thinking_tokens=thinking,
        cached_tokens=cached or 0,
    )


def _error_body(body: Any) -> dict[str, Any]:
    """The error object of an answer: OpenAI wraps it, vLLM's older versions do not, others send a string."""
    if not isinstance(body, dict):
        return {}
    error = body.get("error", body)
    return error if isinstance(error, dict) else {"message": error}


def _code(error: Any) -> object:
    return error.get("code") if isinstance(error, dict) else None


def _wait_s(refusal: Refusal, text: str) -> float | None:
    """The wait that the header asks for, or the message ("try again in 1m2.5s")."""
    if (asked := retry_after_s(refusal.headers)) is not None:
        return asked
    found = _WAIT.search(text)
    if not found or not any(found.groups()):
        return None
    hours, minutes, seconds, unit = found.groups()
    return 3600.0 * int(hours or 0) + 60.0 * int(minutes or 0) + float(seconds or 0) / (1000 if unit == "ms" else 1)
