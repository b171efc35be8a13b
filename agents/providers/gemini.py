"""Gemini through google-genai. Its own retries are off: waiting is the scheduler's work. An answer without a finish reason,
which the SDK takes for whole, is ProviderUnavailable.
"""

import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from google import genai
from google.genai import errors, types

from agents.providers.transport import aiohttp_transport, retry_after_s, timeouts, translate_transport_errors
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, Blocked, ProviderError, ProviderUnavailable, RateLimited

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
        base_url: empty: Google's.
        thinking_budget: tokens the model may think, which are a part of `max_tokens`; None: none, or as few as the model allows.

    Raises:
        AuthFailed: neither GEMINI_API_KEY nor GOOGLE_API_KEY is set.
    """

    name = "gemini"

    def __init__(self, *, base_url: str = "", thinking_budget: int | None = None) -> None:
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        if key is None:
            raise AuthFailed(f"no key for Gemini: {' or '.join(KEY_VARIABLES)} is not set", hint=_KEY_HINT)
        self._thinking_budget = thinking_budget
        self._http = httpx.AsyncClient(transport=aiohttp_transport(trust_env=True), timeout=timeouts())
        self._client = genai.Client(
            api_key=key,
            vertexai=False,
            http_options=types.HttpOptions(api_version="v1beta", base_url=base_url or None, httpx_async_client=self._http),
        )
        self.host = base_url or "Gemini"

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        started = time.perf_counter()
        with self._translated():
            reply = await self._client.aio.models.generate_content(
                model=model, contents=_contents(messages), config=self._config(model, messages, sampling)
            )
        latency_s = time.perf_counter() - started
        return Completion(_text(reply), self._finish(reply), _usage(reply), model, latency_s)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        last: types.GenerateContentResponse | None = None
        with self._translated():
            parts = await self._client.aio.models.generate_content_stream(
                model=model, contents=_contents(messages), config=self._config(model, messages, sampling)
            )
            async for part in parts:
                last = part
                if text := _text(part):
                    yield text
        match self._finish(last):
            case "length":
                raise ProviderError(f"the answer was cut at {sampling.max_tokens} tokens", hint="ask for more tokens")
            case "other":
                raise ProviderUnavailable(f"{self.host} broke off its answer")

    async def models(self) -> list[str]:
        with self._translated():
            return [entry.name.removeprefix("models/") async for entry in await self._client.aio.models.list() if entry.name]

    async def aclose(self) -> None:
        await self._client.aio.aclose()
        await self._http.aclose()

    def _config(self, model: str, messages: Sequence[Message], sampling: Sampling) -> types.GenerateContentConfig:
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        return types.GenerateContentConfig(
            system_instruction=system or None,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_output_tokens=sampling.max_tokens,
            seed=sampling.seed,
            thinking_config=thinking(model, self._thinking_budget),
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        )

    def _finish(self, reply: types.GenerateContentResponse | None) -> FinishReason:
        feedback = reply.prompt_feedback if reply else None
        if feedback and feedback.block_reason:
            raise Blocked(f"{self.host} refused the prompt: {feedback.block_reason.value}")
        candidate = reply.candidates[0] if reply and reply.candidates else None
        reason = candidate.finish_reason if candidate else None
        if reason is None:
            raise ProviderUnavailable(f"{self.host} ended its answer without a finish reason")
        if reason in _BLOCKED:
            raise Blocked(f"{self.host} refused to answer: {reason.value}")
        return _FINISH.get(reason, "other")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translate_transport_errors(self.host, "check the network, and the lane's base_url"):
                yield
        except errors.APIError as error:
            raise self._error(error) from error
        except (
            ValueError,
            TypeError,
            AttributeError,
        ) as error:  # no JSON (a proxy's page), or of a shape that the SDK stumbles over
            raise ProviderUnavailable(f"{self.host} does not answer as Gemini does: {error}") from error

    def _error(self, error: errors.APIError) -> ProviderError:
        what = f"{self.host}: {error.message or error.status or error.code}"
        details = _details(error)
        if error.code in (401, 403) or any(detail.get("reason") == "API_KEY_INVALID" for detail in details):
            return AuthFailed(what, hint=_KEY_HINT)
        wait_s = _wait_s(error, details)
        if error.code == 429:
            return _rate_limited(what, wait_s, details)
        if 400 <= error.code < 500 and error.code != 408:
            return BadRequest(what, hint="check the name of the lane's model")
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


def _contents(messages: Sequence[Message]) -> list[types.Content | types.ContentDict]:
    roles = {"user": "user", "assistant": "model"}
    return [
        types.Content(role=roles[message.role], parts=[types.Part(text=message.content)])
        for message in messages
        if message.role != "system"
    ]


def _text(reply: types.GenerateContentResponse) -> str:
    """The answer without the model's thoughts. (`reply.text` warns about every other part.)"""
    content = reply.candidates[0].content if reply.candidates else None
    return "".join(part.text for part in (content.parts if content else None) or [] if part.text and not part.thought)


def _usage(reply: types.GenerateContentResponse) -> Usage:
    counted = reply.usage_metadata
    if counted is None:
        return Usage()
    return Usage(
        prompt_tokens=counted.prompt_token_count or 0,
        completion_tokens=counted.candidates_token_count or 0,
        thinking_tokens=counted.thoughts_token_count or 0,
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
    violations = [violation for detail in details for violation in detail.get("violations", []) if isinstance(violation, dict)]
    per_day = any("PerDay" in str(violation.get("quotaId")) for violation in violations)
    hint = "the daily quota is used up: it comes back at midnight Pacific time" if per_day else "lower the lane's rpm or slots"
    return RateLimited(what, retry_after_s=wait_s, per_day=per_day, hint=hint)
