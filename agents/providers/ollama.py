"""Ollama, and servers that speak its API. A prompt is never cut without a word: refused before it is sent, refused by the server
(servers older than 0.12.6 do not know how), noticed after.
"""

import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import httpx
import ollama

from agents import tokens
from agents.providers.transport import (
    PROMPT_CUT,
    checked_address,
    checked_key,
    clip,
    decoded_schema,
    judged,
    require_whole,
    retry_after_s,
)
from agents.providers.wire import Refusal, Wire
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.base import Tolerant
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ModelMissing, Overloaded, ProviderError, ProviderUnavailable, RateLimited

KEY_VARIABLE = "OLLAMA_API_KEY"
_INSIDE = -1  # the status of an error inside an answer that began with 200
_FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
# Ollama answers 500 also to what no retry can mend: an option of a wrong type, a format that is no schema.
_BAD_500 = re.compile(r"^option |invalid format|invalid option", re.IGNORECASE)
_TOO_LONG = re.compile(r"exceed_context_size|longer than the context|exceeds the (available )?context")
_MISSING = re.compile(r"model ['\"]?([^\s'\"]+)['\"]? not found")
_UNKNOWN = "manifest: file does not exist"  # the registry does not have the model
_TOO_LONG_HINT = "raise num_ctx, or shorten the prompt"
_REFUSED_HINT = "start it with `ollama serve`, or set OLLAMA_HOST (or the lane's host) to where it runs"


@dataclass(frozen=True)
class PullProgress:
    """`status` is the server's word for the step; bytes are those of the layer it is at, 0 where it does not say."""

    status: str
    done_bytes: int
    total_bytes: int


class _Error(Tolerant):
    error: Any = None


class _Client(ollama.AsyncClient):
    """The SDK over our wire, which is lighter than httpx and keeps the headers of an error. A chat gets two fields that the SDK
    does not know: an overlong prompt is refused (`truncate`), and a long answer does not push the start of the prompt out of the
    window (`shift`).
    """

    def __init__(self, host: str, key: str, idle_timeout_s: float | None) -> None:
        # Nothing goes through a client of its own: it only says how Ollama reads an address.
        super().__init__(host=host, transport=httpx.AsyncBaseTransport(), trust_env=False)
        self._host = host
        self._idle_timeout_s = idle_timeout_s
        self.wire = Wire(
            str(self._client.base_url),
            name=host,
            api="Ollama",
            refused=self._refused,
            hint=_REFUSED_HINT,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            secret=key,
        )

    async def _request(self, cls: Any, *args: Any, json: Any = None, stream: bool = False, **_: Any) -> Any:
        method, path = args
        if path == "/api/chat":
            json |= {"truncate": False, "shift": False}

        def read(document: bytes) -> Any:
            if b'"error"' in document and (told := _Error.model_validate_json(document).error):
                raise self.wire.error_inside({"error": told}, _INSIDE, begun=False)
            return cls.model_validate_json(document)

        if stream:
            return self.wire.stream(path, json, read, self._idle_timeout_s)
        return await (self.wire.get(path, read) if method == "GET" else self.wire.post(path, json, read))

    def _refused(self, refusal: Refusal) -> ProviderError:
        told = refusal.body.get("error") if isinstance(refusal.body, dict) else None
        text, status = clip(str(told)) if told else refusal.text, refusal.status
        what = f"{self._host}: {text}"
        if status == 429:
            return RateLimited(what, retry_after_s=retry_after_s(refusal.headers), hint="lower the lane's slots")
        if status == 503:
            return Overloaded(what, retry_after_s=retry_after_s(refusal.headers), hint="lower the lane's slots")
        if missing := _MISSING.search(text):
            return ModelMissing(what, hint=f"on that machine run: ollama pull {missing[1]}")
        if _UNKNOWN in text:
            return ModelMissing(what, hint="check the model's name at https://ollama.com/library")
        if _TOO_LONG.search(text):
            return BadRequest(what, parameter="num_ctx", hint=_TOO_LONG_HINT)
        if status in (401, 403):
            return AuthFailed(what, hint="set OLLAMA_API_KEY, or check who may use that server")
        if 300 <= status < 500 or status == 501 or _BAD_500.search(text):
            return BadRequest(what, hint="the model or the server's version does not support this request")
        return ProviderUnavailable(what, billable=status == _INSIDE, hint="look at the server's log")


class OllamaProvider:
    """A server that speaks Ollama's API.

    Args:
        host: as Ollama takes it (host, host:port or URL); empty: OLLAMA_HOST, else this machine.
        idle_timeout_s: how long no piece of an answer may come once it has begun; None: answers are not streamed.
        api_key: empty: OLLAMA_API_KEY, if it is set.

    Raises:
        AuthFailed: the key holds characters that no key has.
        ConfigError: the host holds a password or the like.
    """

    name = "ollama"

    def __init__(self, host: str = "", *, idle_timeout_s: float | None = None, api_key: str = "") -> None:
        self.host = checked_address(host or os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434", "the host of Ollama")
        self._streamed = idle_timeout_s is not None
        key = checked_key(api_key or os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE)
        self._client = _Client(self.host, key, idle_timeout_s)

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        floor = _refuse_too_long(messages, sampling)
        started = time.perf_counter()
        if self._streamed:
            parts = [part async for part in self._parts(model, messages, sampling)]
        else:
            parts = [await self._client.chat(**_request(model, messages, sampling), stream=False)]
        return self._completed(parts, model, floor, sampling, time.perf_counter() - started)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        async with aclosing(self.told(model, messages, sampling)) as parts:
            async for part in parts:
                if isinstance(part, str):
                    yield part
                else:
                    require_whole(self.host, part.finish_reason, part.detail, sampling)

    async def told(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[str | Completion]:
        """The pieces of an answer as they come, then all of it, with how it ended; raises where `generate` would."""
        floor = _refuse_too_long(messages, sampling)
        started = time.perf_counter()
        parts: list[ollama.ChatResponse] = []
        async with aclosing(self._parts(model, messages, sampling)) as answer:
            async for part in answer:
                parts.append(part)
                if part.message.content:
                    yield part.message.content
        yield self._completed(parts, model, floor, sampling, time.perf_counter() - started)

    async def models(self) -> list[str]:
        return list(await self.digests())

    async def digests(self) -> dict[str, str]:
        """The models of `models`, each with the digest of what it is made of now; empty where the server does not say."""
        return {entry.model: entry.digest or "" for entry in (await self._client.list()).models if entry.model}

    async def pull(self, model: str) -> AsyncIterator[PullProgress]:
        """Fetch a model to the server; ends when it is there.

        Raises:
            ModelMissing: the registry does not have it.
            ProviderUnavailable: the server, or its way to the registry, failed; what was fetched is kept there.
        """
        step = ""
        async for line in await self._client.pull(model, stream=True):
            step = line.status or ""
            yield PullProgress(step, line.completed or 0, line.total or 0)
        if step != "success":
            raise ProviderUnavailable(f"{self.host} broke off fetching {model} ({step or 'no word'})", hint="run it again")

    async def aclose(self) -> None:
        await self._client.wire.aclose()

    async def _parts(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[ollama.ChatResponse]:
        answer = await self._client.chat(**_request(model, messages, sampling), stream=True)
        async with aclosing(cast(AsyncGenerator[ollama.ChatResponse], answer)) as parts:  # who breaks off hangs up at once
            async for part in parts:
                yield part

    def _completed(
        self, parts: Sequence[ollama.ChatResponse], model: str, floor: int, sampling: Sampling, latency_s: float
    ) -> Completion:
        text = "".join(part.message.content or "" for part in parts)
        finish, detail = judged(text, *self._ended(parts[-1] if parts else None, floor, sampling), sampling)
        usage = Usage(prompt_tokens=parts[-1].prompt_eval_count or 0, completion_tokens=parts[-1].eval_count or 0)
        return Completion(text, finish, usage, parts[-1].model or model, latency_s, detail)

    def _ended(self, last: ollama.ChatResponse | None, floor: int, sampling: Sampling) -> tuple[FinishReason, str]:
        if last is None or not last.done or not last.done_reason:
            raise ProviderUnavailable(f"{self.host} did not say how its answer ended", hint="look at the server's log")
        seen = last.prompt_eval_count
        if seen is not None and (seen < floor or seen >= sampling.num_ctx):
            return "other", PROMPT_CUT  # the model answered a part of the prompt
        finish = _FINISH.get(last.done_reason, "other")
        return finish, "" if finish == "stop" else last.done_reason


def _refuse_too_long(messages: Sequence[Message], sampling: Sampling) -> int:
    """The least tokens the prompt can have. Raises BadRequest where even these do not fit the context window."""
    floor = tokens.at_least(messages)
    if floor >= sampling.num_ctx:
        raise BadRequest(
            f"the prompt has at least {floor} tokens, the context window num_ctx is {sampling.num_ctx}",
            parameter="num_ctx",
            hint=_TOO_LONG_HINT,
        )
    return floor


def _request(model: str, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_ctx": sampling.num_ctx,
        "num_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        options["seed"] = sampling.seed
    if sampling.top_k is not None:
        options["top_k"] = sampling.top_k
    if sampling.stop:
        options["stop"] = list(sampling.stop)
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "options": options,
    }
    return {**request, "format": decoded_schema(sampling.schema)} if sampling.schema else request
