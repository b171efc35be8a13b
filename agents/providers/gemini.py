"""Gemini through google-genai. Its own retries are off: waiting is the scheduler's work. An answer without a finish reason,
which the SDK takes for whole, is ProviderUnavailable.

Blocked prompts and answers are returned as such: their prompt was billed.
"""

import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from google import genai
from google.genai import errors, types

from agents.addresses import at_home
from agents.providers.transport import (
    SILENCE_S,
    checked_address,
    checked_key,
    clip,
    decoded_schema,
    in_time,
    judged,
    open_session,
    require_whole,
    retry_after_s,
    translate_transport_errors,
)
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ModelMissing, Overloaded, ProviderError, ProviderUnavailable, RateLimited

KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
_KEY_HINT = "get a key at https://aistudio.google.com/apikey and export GEMINI_API_KEY=…"
_FINISH: dict[types.FinishReason, FinishReason] = {types.FinishReason.STOP: "stop", types.FinishReason.MAX_TOKENS: "length"}
_BLOCKED = frozenset(
    {
        types.FinishReason.SAFETY,
        types.FinishReason.RECITATION,
        types.FinishReason.BLOCKLIST,
        types.FinishReason.PROHIBITED_CONTENT,
        types.FinishReason.SPII,
        types.FinishReason.MODEL_ARMOR,
    }
)


class GeminiProvider:
    """The Gemini developer API.

    Args:
        base_url: empty: GOOGLE_GEMINI_BASE_URL, else Google's.
        thinking_budget: tokens the model may think; None: none, or as few as the model allows.
        idle_timeout_s: how long no piece of an answer may come once it has begun; None: answers are not streamed.
        api_key: None: GEMINI_API_KEY, else GOOGLE_API_KEY.

    Raises:
        AuthFailed: there is no key.
        ConfigError: the address holds a password or the like.
    """

    name = "gemini"

    def __init__(
        self,
        *,
        base_url: str = "",
        thinking_budget: int | None = None,
        idle_timeout_s: float | None = None,
        api_key: str | None = None,
    ) -> None:
        self._key = _key(api_key)
        self._base_url = checked_address(base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL", ""), "the address for Gemini")
        self._thinking_budget = thinking_budget
        self._idle_timeout_s = idle_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self.host = self._base_url or "Gemini"

    def prepare(self) -> None:
        """Make the client now: made with the first requests, it would send them later than they were counted."""
        _ = self._client

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        started = time.perf_counter()
        if self._idle_timeout_s is None:
            with self._translated():
                reply = await self._client.aio.models.generate_content(
                    model=model, contents=_contents(messages), config=self._config(model, messages, sampling)
                )
            parts = [reply]
        else:
            parts = [part async for part in self._parts(model, messages, sampling)]
        return self._completion(parts, model, sampling, time.perf_counter() - started)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        ends: list[types.GenerateContentResponse] = []
        async for part in self._parts(model, messages, sampling):
            if text := _text(part):
                yield text
            if _block_reason(part) or _finish_reason(part):
                ends.append(part)
        require_whole(self.host, *self._ended(ends), sampling)

    async def models(self) -> list[str]:
        with self._translated():
            return [entry.name.removeprefix("models/") async for entry in await self._client.aio.models.list() if entry.name]

    async def aclose(self) -> None:
        if self._session is not None:
            await self._client.aio.aclose()
            await self._session.close()

    @cached_property
    def _client(self) -> genai.Client:
        # Made with the first request: the session belongs to the running event loop. With a session of one's own the SDK sends
        # over aiohttp directly; retry_options keep it from trying again by itself after a connection error.
        self._session = open_session(trust_env=not self._base_url or not at_home(urlsplit(self._base_url).hostname or ""))
        options = types.HttpOptions(
            api_version="v1beta",
            base_url=self._base_url or None,
            async_client_args={"allow_redirects": False},
            timeout=round(1000 * SILENCE_S),
            aiohttp_client=self._session,
            retry_options=types.HttpRetryOptions(attempts=1),
        )
        return genai.Client(api_key=self._key, vertexai=False, http_options=options)

    async def _parts(
        self, model: str, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncIterator[types.GenerateContentResponse]:
        with self._translated():
            parts = await self._client.aio.models.generate_content_stream(
                model=model, contents=_contents(messages), config=self._config(model, messages, sampling)
            )
            begun = False
            try:
                async for part in in_time(parts, self._idle_timeout_s, self.host):
                    begun = True
                    yield part
            except errors.APIError as error:
                told = self._error(error)
                raise ProviderUnavailable(str(told), hint=told.hint) if begun else told from None

    def _config(self, model: str, messages: Sequence[Message], sampling: Sampling) -> types.GenerateContentConfig:
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        return _config(model, system, sampling, self._thinking_budget)

    def _completion(
        self, parts: Sequence[types.GenerateContentResponse], model: str, sampling: Sampling, latency_s: float
    ) -> Completion:
        """What the pieces of an answer make. Raises ProviderUnavailable where they do not say how it ended."""
        text = "".join(_text(part) for part in parts)
        finish, detail = judged(text, *self._ended(parts), sampling)
        usage = next((_usage(part) for part in reversed(parts) if part.usage_metadata), Usage())
        return Completion(text, finish, usage, model, latency_s, detail)

    def _ended(self, parts: Sequence[types.GenerateContentResponse]) -> tuple[FinishReason, str]:
        for part in reversed(parts):
            if blocked := _block_reason(part):
                return "blocked", blocked
            if reason := _finish_reason(part):
                finish = "blocked" if reason in _BLOCKED else _FINISH.get(reason, "other")
                return finish, "" if finish == "stop" else reason.value
        raise ProviderUnavailable(f"{self.host} ended its answer without a finish reason")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translate_transport_errors(self.host, "check the network, and the lane's base_url", self._key):
                yield
        except errors.APIError as error:
            raise self._error(error) from None
        except (ValueError, TypeError, AttributeError) as error:
            # No JSON (a proxy's page), or of a shape that the SDK stumbles over.
            what = clip(str(error), self._key)
            raise ProviderUnavailable(f"{self.host} does not answer as Gemini does: {what}") from None

    def _error(self, error: errors.APIError) -> ProviderError:
        what = clip(f"{self.host}: {error.message or error.status or error.code}", self._key)
        details, code = _details(error), error.code
        if code in (401, 403) or any(detail.get("reason") == "API_KEY_INVALID" for detail in details):
            return AuthFailed(what, hint=_KEY_HINT)
        wait_s = _wait_s(error, details)
        if code == 429:
            return _rate_limited(what, wait_s, details)
        if code == 404 and "model" in what:
            return ModelMissing(what, hint="check the lane's model: https://ai.google.dev/gemini-api/docs/models")
        if code == 503:
            return Overloaded(what, retry_after_s=wait_s)
        if isinstance(code, int) and 300 <= code < 500 and code not in (408, 409):
            return BadRequest(what, hint="check the lane's model and sampling")
        return ProviderUnavailable(what, billable=False, retry_after_s=wait_s)


def thinking(model: str, budget: int | None) -> types.ThinkingConfig | None:
    """What to send about thinking. Without a wish: off, or the least the model allows; nothing to models that do not think."""
    if budget is not None:
        return types.ThinkingConfig(thinking_budget=budget)
    name = model.removeprefix("models/")
    if name.startswith("gemini-2.5"):
        return types.ThinkingConfig(thinking_budget=128 if "pro" in name else 0)
    if name.startswith("gemini-3"):
        return types.ThinkingConfig(thinking_level=types.ThinkingLevel.LOW if "pro" in name else types.ThinkingLevel.MINIMAL)
    return None


def _key(api_key: str | None) -> str:
    given = {"the key for Gemini": api_key} if api_key is not None else {name: os.environ.get(name) for name in KEY_VARIABLES}
    for where, key in given.items():
        if key := checked_key(key or "", where):
            return key
    raise AuthFailed(f"no key for Gemini: {' or '.join(KEY_VARIABLES)} is not set", hint=_KEY_HINT)


@lru_cache(maxsize=64)
def _config(model: str, system: str, sampling: Sampling, budget: int | None) -> types.GenerateContentConfig:
    """Kept, because making one costs as much as the rest of a request; the SDK works on a copy."""
    return types.GenerateContentConfig(
        system_instruction=system or None,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_output_tokens=sampling.max_tokens,
        seed=sampling.seed,
        thinking_config=thinking(model, budget),
        response_mime_type="application/json" if sampling.schema else None,
        response_json_schema=decoded_schema(sampling.schema) if sampling.schema else None,
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
    )


def _contents(messages: Sequence[Message]) -> list[types.Content | types.ContentDict]:
    roles = {"user": "user", "assistant": "model"}
    return [{"role": roles[each.role], "parts": [{"text": each.content}]} for each in messages if each.role != "system"]


def _text(reply: types.GenerateContentResponse) -> str:
    """The answer without the model's thoughts. (`reply.text` warns about every other part.)"""
    content = reply.candidates[0].content if reply.candidates else None
    return "".join(part.text for part in (content.parts if content else None) or [] if part.text and not part.thought)


def _block_reason(reply: types.GenerateContentResponse) -> str:
    """Why the prompt was refused; empty: it was not."""
    feedback = reply.prompt_feedback
    return feedback.block_reason.value if feedback and feedback.block_reason else ""


def _finish_reason(reply: types.GenerateContentResponse) -> types.FinishReason | None:
    return reply.candidates[0].finish_reason if reply.candidates else None


def _usage(reply: types.GenerateContentResponse) -> Usage:
    counted = reply.usage_metadata
    if counted is None:
        return Usage()
    return Usage(
        prompt_tokens=counted.prompt_token_count or 0,
        completion_tokens=counted.candidates_token_count or 0,
        thinking_tokens=counted.thoughts_token_count or 0,
        cached_tokens=counted.cached_content_token_count or 0,
    )


def _details(error: errors.APIError) -> list[dict[str, Any]]:
    """The google.rpc details of an error body; what is not shaped like one is left out."""
    body = error.details.get("error", {}) if isinstance(error.details, Mapping) else {}
    details = body.get("details", []) if isinstance(body, Mapping) else []
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _wait_s(error: errors.APIError, details: list[dict[str, Any]]) -> float | None:
    """The wait that the body (google.rpc.RetryInfo) or the header asks for."""
    for detail in details:
        if delay := re.fullmatch(r"(\d+(?:\.\d+)?)s", str(detail.get("retryDelay"))):
            return float(delay[1])
    headers = getattr(error.response, "headers", None)
    return retry_after_s(headers) if headers is not None else None


def _rate_limited(what: str, wait_s: float | None, details: list[dict[str, Any]]) -> RateLimited:
    found = [detail["violations"] for detail in details if isinstance(detail.get("violations"), list)]
    per_day = any("PerDay" in str(each.get("quotaId")) for each in sum(found, []) if isinstance(each, dict))
    hint = "the daily quota is used up: it comes back at midnight Pacific time" if per_day else "lower the lane's rpm or slots"
    return RateLimited(what, retry_after_s=wait_s, per_day=per_day, hint=hint)
