"""Gemini's developer API: https://ai.google.dev/api/generate-content.

- An answer without a finish reason is none: ProviderUnavailable.
- Blocked prompts and answers are returned as such: their prompt was billed.

Without Google's SDK, which serves the batches (gemini_jobs.py): it takes an answer without a finish reason for whole, tries again
by itself, and to ask by it costs twice the time of all the rest of a sample.
"""

import os
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from pydantic import AliasGenerator, ConfigDict
from pydantic.alias_generators import to_camel

from agents.providers.transport import checked_address, checked_key, clip, decoded_schema, judged, require_whole, retry_after_s
from agents.providers.wire import Refusal, Wire
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.base import Tolerant
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ModelMissing, Overloaded, ProviderError, ProviderUnavailable, RateLimited

KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
GOOGLE = "https://generativelanguage.googleapis.com"
_VERSION = "v1beta"
_PAGE = 1000  # models in one list: the most that the server gives
NETWORK_HINT = "check the network, and the lane's base_url"
_KEY_HINT = "get a key at https://aistudio.google.com/apikey and export GEMINI_API_KEY=…"
_ROLES = {"user": "user", "assistant": "model"}
_FINISH: dict[str, FinishReason] = {"STOP": "stop", "MAX_TOKENS": "length"}
_BLOCKED = frozenset({"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR"})

Json = dict[str, Any]


class _Shape(Tolerant):
    model_config = ConfigDict(alias_generator=AliasGenerator(validation_alias=to_camel))


class _Text(_Shape):
    text: str = ""
    thought: bool = False


class _Content(_Shape):
    parts: list[_Text] | None = None


class _Candidate(_Shape):
    content: _Content | None = None
    finish_reason: str = ""


class _Feedback(_Shape):
    block_reason: str = ""


class _Counted(_Shape):
    prompt_token_count: int = 0
    candidates_token_count: int = 0
    thoughts_token_count: int = 0
    cached_content_token_count: int = 0


class Part(_Shape):
    """A whole answer, or a piece of a streamed one."""

    candidates: list[_Candidate] | None = None
    prompt_feedback: _Feedback | None = None
    usage_metadata: _Counted | None = None
    error: Any = None

    @property
    def text(self) -> str:
        """The answer without the model's thoughts."""
        content = self.candidates[0].content if self.candidates else None
        return "".join(part.text for part in (content.parts if content else None) or [] if not part.thought)

    @property
    def block_reason(self) -> str:
        """Why the prompt was refused; empty: it was not."""
        return self.prompt_feedback.block_reason if self.prompt_feedback else ""

    @property
    def finish_reason(self) -> str:
        return self.candidates[0].finish_reason if self.candidates else ""

    @property
    def usage(self) -> Usage:
        counted = self.usage_metadata or _Counted()
        return Usage(
            prompt_tokens=counted.prompt_token_count,
            completion_tokens=counted.candidates_token_count,
            thinking_tokens=counted.thoughts_token_count,
            cached_tokens=counted.cached_content_token_count,
        )


class _Model(_Shape):
    name: str


class _Models(_Shape):
    models: list[_Model] = []
    next_page_token: str = ""


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
        self.host = self._base_url or "Gemini"
        self._wire = Wire(
            f"{(self._base_url or GOOGLE).rstrip('/')}/{_VERSION}",
            name=self.host,
            api="Gemini",
            refused=self._refused,
            hint=NETWORK_HINT,
            headers={"x-goog-api-key": self._key},
            secret=self._key,
            proxy=True,
        )

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        started = time.perf_counter()
        body = self.request(model, messages, sampling)
        if self._idle_timeout_s is None:
            parts = [await self._wire.post(f"/{_named(model)}:generateContent", body, Part.model_validate_json)]
        else:
            parts = [part async for part in self._parts(model, body)]
        return self.completed(parts, model, sampling, time.perf_counter() - started)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        ends: list[Part] = []
        async for part in self._parts(model, self.request(model, messages, sampling)):
            if part.text:
                yield part.text
            if part.block_reason or part.finish_reason:
                ends.append(part)
        require_whole(self.host, *self._ended(ends), sampling)

    async def models(self) -> list[str]:
        names: list[str] = []
        page = ""
        while True:
            listing = await self._wire.get(f"/models?pageSize={_PAGE}{page}", _Models.model_validate_json)
            names += [entry.name.removeprefix("models/") for entry in listing.models]
            if not listing.next_page_token:
                return names
            page = f"&pageToken={quote(listing.next_page_token)}"

    async def aclose(self) -> None:
        await self._wire.aclose()

    def request(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Json:
        """The body of a request, online or in a batch."""
        contents = [{"role": _ROLES[each.role], "parts": [{"text": each.content}]} for each in messages if each.role != "system"]
        body: Json = {"contents": contents, "generationConfig": _config(model, sampling, self._thinking_budget)}
        if system := "\n\n".join(message.content for message in messages if message.role == "system"):
            body["systemInstruction"] = {"parts": [{"text": system}]}
        return body

    def completed(self, parts: Sequence[Part], model: str, sampling: Sampling, latency_s: float) -> Completion:
        """What the pieces of an answer make. Raises ProviderUnavailable where they do not say how it ended."""
        text = "".join(part.text for part in parts)
        finish, detail = judged(text, *self._ended(parts), sampling)
        usage = next((part.usage for part in reversed(parts) if part.usage_metadata), Usage())
        return Completion(text, finish, usage, model, latency_s, detail)

    async def _parts(self, model: str, body: Json) -> AsyncIterator[Part]:
        path = f"/{_named(model)}:streamGenerateContent?alt=sse"
        begun = False
        async with aclosing(self._wire.stream(path, body, Part.model_validate_json, self._idle_timeout_s)) as parts:
            async for part in parts:
                if part.error:
                    code = part.error.get("code") if isinstance(part.error, dict) else None
                    raise self._wire.error_inside({"error": part.error}, code, begun=begun)
                begun = True
                yield part

    def _ended(self, parts: Sequence[Part]) -> tuple[FinishReason, str]:
        for part in reversed(parts):
            if part.block_reason:
                return "blocked", part.block_reason
            if reason := part.finish_reason:
                finish = "blocked" if reason in _BLOCKED else _FINISH.get(reason, "other")
                return finish, "" if finish == "stop" else reason
        raise ProviderUnavailable(f"{self.host} ended its answer without a finish reason")

    def _refused(self, refusal: Refusal) -> ProviderError:
        error, code = _error_body(refusal.body), refusal.status
        what = clip(f"{self.host}: {error.get('message') or error.get('status') or refusal.text}", self._key)
        details = _details(error)
        if code in (401, 403) or any(detail.get("reason") == "API_KEY_INVALID" for detail in details):
            return AuthFailed(what, hint=_KEY_HINT)
        wait_s = _wait_s(refusal.headers, details)
        if code == 429:
            return _rate_limited(what, wait_s, details)
        if code == 404 and "model" in what:
            return ModelMissing(what, hint="check the lane's model: https://ai.google.dev/gemini-api/docs/models")
        if code == 503:
            return Overloaded(what, retry_after_s=wait_s)
        if 300 <= code < 500 and code not in (408, 409):
            return BadRequest(what, hint="check the lane's model and sampling")
        return ProviderUnavailable(what, billable=False, retry_after_s=wait_s)


def thinking(model: str, budget: int | None) -> Json | None:
    """What to send about thinking. Without a wish: off, or the least the model allows; nothing to models that do not think."""
    if budget is not None:
        return {"thinkingBudget": budget}
    name = model.removeprefix("models/")
    if name.startswith("gemini-2.5"):
        return {"thinkingBudget": 128 if "pro" in name else 0}
    if name.startswith("gemini-3"):
        return {"thinkingLevel": "LOW" if "pro" in name else "MINIMAL"}
    return None


def _key(api_key: str | None) -> str:
    given = {"the key for Gemini": api_key} if api_key is not None else {name: os.environ.get(name) for name in KEY_VARIABLES}
    for where, key in given.items():
        if key := checked_key(key or "", where):
            return key
    raise AuthFailed(f"no key for Gemini: {' or '.join(KEY_VARIABLES)} is not set", hint=_KEY_HINT)


def _named(model: str) -> str:
    return model if model.startswith(("models/", "tunedModels/")) else f"models/{model}"


def _config(model: str, sampling: Sampling, budget: int | None) -> Json:
    config: Json = {"temperature": sampling.temperature, "topP": sampling.top_p, "maxOutputTokens": sampling.max_tokens}
    if sampling.seed is not None:
        config["seed"] = sampling.seed
    if wanted := thinking(model, budget):
        config["thinkingConfig"] = wanted
    if sampling.schema:
        config |= {"responseMimeType": "application/json", "responseJsonSchema": decoded_schema(sampling.schema)}
    return config


def _error_body(body: object) -> Json:
    """The error object of an answer; a stream that fails at once wraps it in a list."""
    first = body[0] if isinstance(body, list) and body else body
    error = first.get("error") if isinstance(first, dict) else None
    return error if isinstance(error, dict) else {}


def _details(error: Json) -> list[Json]:
    """The google.rpc details of an error; what is not shaped like one is left out."""
    details = error.get("details")
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _wait_s(headers: Mapping[str, str], details: list[Json]) -> float | None:
    """The wait that the body (google.rpc.RetryInfo) or the header asks for."""
    for detail in details:
        if delay := re.fullmatch(r"(\d+(?:\.\d+)?)s", str(detail.get("retryDelay"))):
            return float(delay[1])
    return retry_after_s(headers)


def _rate_limited(what: str, wait_s: float | None, details: list[Json]) -> RateLimited:
    found = [detail["violations"] for detail in details if isinstance(detail.get("violations"), list)]
    per_day = any("PerDay" in str(each.get("quotaId")) for each in sum(found, []) if isinstance(each, dict))
    hint = "the daily quota is used up: it comes back at midnight Pacific time" if per_day else "lower the lane's rpm or slots"
    return RateLimited(what, retry_after_s=wait_s, per_day=per_day, hint=hint)
