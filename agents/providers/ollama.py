"""Ollama, and servers that speak its API. A prompt is never cut without a word: refused before it is sent, refused by the server
(servers older than 0.12.6 do not know how), noticed after.
"""

import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import ollama

from agents import tokens
from agents.providers.transport import (
    PROMPT_CUT,
    aiohttp_transport,
    checked_address,
    checked_key,
    clip,
    decoded_schema,
    in_time,
    judged,
    require_whole,
    retry_after_s,
    timeouts,
    translate_transport_errors,
)
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ModelMissing, Overloaded, ProviderError, ProviderUnavailable, RateLimited

KEY_VARIABLE = "OLLAMA_API_KEY"
_FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
# Ollama answers 500 also to what no retry can mend: an option of a wrong type, a format that is no schema.
_BAD_500 = re.compile(r"^option |invalid format|invalid option", re.IGNORECASE)
_TOO_LONG = re.compile(r"exceed_context_size|longer than the context|exceeds the (available )?context")
_MISSING = re.compile(r"model ['\"]?([^\s'\"]+)['\"]? not found")
_UNKNOWN = "manifest: file does not exist"  # the registry does not have the model
_REFUSED_HINT = "start it with `ollama serve`, or set OLLAMA_HOST (or the lane's host) to where it runs"


@dataclass(frozen=True)
class PullProgress:
    """`status` is the server's word for the step; bytes are those of the layer it is at, 0 where it does not say."""

    status: str
    done_bytes: int
    total_bytes: int


class _Client(ollama.AsyncClient):
    """The SDK, with two fields of a chat that it does not know: an overlong prompt is refused (`truncate`), and a long answer
    does not push the start of the prompt out of the window (`shift`).
    """

    async def _request(self, cls: Any, *args: Any, **kwargs: Any) -> Any:
        if "/api/chat" in args:
            kwargs["json"] |= {"truncate": False, "shift": False}
        return await super()._request(cls, *args, **kwargs)


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
        self._idle_timeout_s = idle_timeout_s
        self._key = checked_key(api_key or os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE)
        self._transport = aiohttp_transport(trust_env=False)
        self._client = _Client(
            host=self.host,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            transport=self._transport,
            timeout=timeouts(),
            follow_redirects=False,
            event_hooks={"response": [self._heed_retry_after]},
        )

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        floor = _refuse_too_long(messages, sampling)
        started = time.perf_counter()
        if self._idle_timeout_s is None:
            with self._translated():
                parts = [await self._client.chat(**_request(model, messages, sampling), stream=False)]
        else:
            parts = [part async for part in self._parts(model, messages, sampling)]
        latency_s = time.perf_counter() - started
        text = "".join(part.message.content or "" for part in parts)
        finish, detail = judged(text, *self._ended(parts[-1] if parts else None, floor, sampling), sampling)
        usage = Usage(prompt_tokens=parts[-1].prompt_eval_count or 0, completion_tokens=parts[-1].eval_count or 0)
        return Completion(text, finish, usage, parts[-1].model or model, latency_s, detail)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        floor = _refuse_too_long(messages, sampling)
        last: ollama.ChatResponse | None = None
        async for last in self._parts(model, messages, sampling):
            if last.message.content:
                yield last.message.content
        require_whole(self.host, *self._ended(last, floor, sampling), sampling)

    async def models(self) -> list[str]:
        with self._translated():
            listing = await self._client.list()
        return [entry.model for entry in listing.models if entry.model]

    async def pull(self, model: str) -> AsyncIterator[PullProgress]:
        """Fetch a model to the server; ends when it is there.

        Raises:
            ModelMissing: the registry does not have it.
            ProviderUnavailable: the server, or its way to the registry, failed; what was fetched is kept there.
        """
        step = ""
        with self._translated():
            async for line in await self._client.pull(model, stream=True):
                step = line.status or ""
                yield PullProgress(step, line.completed or 0, line.total or 0)
        if step != "success":
            raise ProviderUnavailable(f"{self.host} broke off fetching {model} ({step or 'no word'})", hint="run it again")

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _parts(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[ollama.ChatResponse]:
        with self._translated():
            parts = await self._client.chat(**_request(model, messages, sampling), stream=True)
            begin = await anext(parts, None)  # a request may wait long for its turn: the clock starts with the answer
            if begin is not None:
                yield begin
                async for part in in_time(parts, self._idle_timeout_s, self.host):
                    yield part

    def _ended(self, last: ollama.ChatResponse | None, floor: int, sampling: Sampling) -> tuple[FinishReason, str]:
        if last is None or not last.done or not last.done_reason:
            raise ProviderUnavailable(f"{self.host} did not say how its answer ended", hint="look at the server's log")
        seen = last.prompt_eval_count
        if seen is not None and (seen < floor or seen >= sampling.num_ctx):
            return "other", PROMPT_CUT  # the model answered a part of the prompt
        finish = _FINISH.get(last.done_reason, "other")
        return finish, "" if finish == "stop" else last.done_reason

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translate_transport_errors(self.host, _REFUSED_HINT, self._key):
                yield
        except ollama.ResponseError as error:
            raise self._error(error.status_code, clip(str(error.error), self._key)) from None
        except (ValueError, TypeError, AttributeError) as error:  # no JSON, or of a shape that the SDK stumbles over
            what = clip(str(error), self._key)
            raise ProviderUnavailable(f"{self.host} does not answer as Ollama does: {what}", hint="check the host") from None

    def _error(self, status: int, text: str) -> ProviderError:
        """`status` is -1 for an error inside an answer that began with 200."""
        what = f"{self.host}: {text}"
        if missing := _MISSING.search(text):
            return ModelMissing(what, hint=f"on that machine run: ollama pull {missing[1]}")
        if _UNKNOWN in text:
            return ModelMissing(what, hint="check the model's name at https://ollama.com/library")
        if _TOO_LONG.search(text):
            return BadRequest(what, hint="raise num_ctx under [sampling], or shorten the prompt")
        if status in (401, 403):
            return AuthFailed(what, hint="set OLLAMA_API_KEY, or check who may use that server")
        if 300 <= status < 500 or status == 501 or _BAD_500.search(text):
            return BadRequest(what, hint="the model or the server's version does not support this request")
        return ProviderUnavailable(what, billable=status < 0, hint="look at the server's log")

    async def _heed_retry_after(self, response: httpx.Response) -> None:
        # A hook, because the SDK's own error leaves the headers out.
        if response.status_code not in (429, 503):
            return
        await response.aread()
        what = f"{self.host}: {clip(str(ollama.ResponseError(response.text).error), self._key)}"
        wait_s = retry_after_s(response.headers)
        if response.status_code == 429:
            raise RateLimited(what, retry_after_s=wait_s, hint="lower the lane's slots")
        raise Overloaded(what, retry_after_s=wait_s, hint="lower the lane's slots")


def _refuse_too_long(messages: Sequence[Message], sampling: Sampling) -> int:
    """The least tokens the prompt can have. Raises BadRequest where even these do not fit the context window."""
    floor = tokens.at_least(messages)
    if floor >= sampling.num_ctx:
        raise BadRequest(
            f"the prompt has at least {floor} tokens, the context window num_ctx is {sampling.num_ctx}",
            hint="raise num_ctx under [sampling], or shorten the prompt",
        )
    return floor


def _request(model: str, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
    options: dict[str, float] = {
        "num_ctx": sampling.num_ctx,
        "num_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        options["seed"] = sampling.seed
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "options": options,
    }
    return {**request, "format": decoded_schema(sampling.schema)} if sampling.schema else request
