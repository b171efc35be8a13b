"""Ollama, and servers that speak its API. A prompt is never cut without a word: refused before, noticed after."""

import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import httpx
import ollama

from agents import tokens
from agents.providers.transport import aiohttp_transport, retry_after_s, timeouts, translate_transport_errors
from agents.task import Completion, FinishReason, Sampling, Usage
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ProviderError, ProviderUnavailable, RateLimited

_FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
# Ollama answers 500 also to what no retry can mend: an option of a wrong type, a format that is no schema.
_BAD_500 = re.compile(r"^option |invalid format|invalid option", re.IGNORECASE)
_REFUSED_HINT = "start it with `ollama serve`, or set OLLAMA_HOST (or the lane's host) to where it runs"


class OllamaProvider:
    """`host` as Ollama takes it (host, host:port or URL); empty: OLLAMA_HOST, else this machine."""

    name = "ollama"

    def __init__(self, host: str = "") -> None:
        self.host = host or os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434"
        self._transport = aiohttp_transport(trust_env=False)
        self._client = ollama.AsyncClient(
            host=self.host,
            transport=self._transport,
            timeout=timeouts(),
            event_hooks={"response": [self._heed_retry_after]},
        )

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        floor = _refuse_too_long(messages, sampling)
        started = time.perf_counter()
        with self._translated(model):
            reply = await self._client.chat(model=model, messages=_wire(messages), options=_options(sampling), stream=False)
        latency_s = time.perf_counter() - started
        finish = self._finish(reply, floor, sampling)
        usage = Usage(prompt_tokens=reply.prompt_eval_count or 0, completion_tokens=reply.eval_count or 0)
        return Completion(reply.message.content or "", finish, usage, reply.model or model, latency_s)

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        floor = _refuse_too_long(messages, sampling)
        last: ollama.ChatResponse | None = None
        with self._translated(model):
            parts = await self._client.chat(model=model, messages=_wire(messages), options=_options(sampling), stream=True)
            async for part in parts:
                last = part
                if part.message.content:
                    yield part.message.content
        if last is None:
            raise ProviderUnavailable(f"{self.host} ended its answer before it began")
        match self._finish(last, floor, sampling):
            case "length":
                raise ProviderError(f"the answer was cut at {sampling.max_tokens} tokens", hint="ask for more tokens")
            case "other":
                raise BadRequest(f"{self.host} cut the prompt to fit {sampling.num_ctx} tokens", hint="raise num_ctx")

    async def models(self) -> list[str]:
        with self._translated(""):
            listing = await self._client.list()
        return [entry.model for entry in listing.models if entry.model]

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _finish(self, reply: ollama.ChatResponse, floor: int, sampling: Sampling) -> FinishReason:
        if not reply.done or not reply.done_reason:
            raise ProviderUnavailable(f"{self.host} did not say how its answer ended", hint="look at the server's log")
        seen = reply.prompt_eval_count
        if seen is not None and (seen < floor or seen >= sampling.num_ctx):
            return "other"  # the model answered a part of the prompt
        return _FINISH.get(reply.done_reason, "other")

    @contextmanager
    def _translated(self, model: str) -> Iterator[None]:
        try:
            with translate_transport_errors(self.host, _REFUSED_HINT):
                yield
        except ollama.ResponseError as error:
            raise self._error(model, error) from error
        except (ValueError, TypeError, AttributeError) as error:  # no JSON, or of a shape that the SDK stumbles over
            raise ProviderUnavailable(f"{self.host} does not answer as Ollama does: {error}", hint="check the host") from error

    def _error(self, model: str, error: ollama.ResponseError) -> ProviderError:
        status, what = error.status_code, f"{self.host}: {error.error}"
        if status == 404:
            return BadRequest(what, hint=f"on that machine run: ollama pull {model}")
        if status in (401, 403):
            return AuthFailed(what, hint="set OLLAMA_API_KEY, or check who may use that server")
        if 400 <= status < 500 or status == 501 or _BAD_500.search(error.error):
            return BadRequest(what, hint="the model or the server's version does not support this request")
        return ProviderUnavailable(what, billable=False, hint="look at the server's log")

    async def _heed_retry_after(self, response: httpx.Response) -> None:
        # A hook, because the SDK's own error leaves the headers out.
        if response.status_code not in (429, 503):
            return
        await response.aread()
        what = f"{self.host}: {ollama.ResponseError(response.text).error}"
        wait_s = retry_after_s(response.headers)
        if response.status_code == 429:
            raise RateLimited(what, retry_after_s=wait_s, hint="lower the lane's slots")
        raise ProviderUnavailable(what, billable=False, retry_after_s=wait_s, hint="lower the lane's slots")


def _refuse_too_long(messages: Sequence[Message], sampling: Sampling) -> int:
    """The least tokens the prompt can have. Raises BadRequest where even these do not fit the context window."""
    floor = tokens.at_least(messages)
    if floor >= sampling.num_ctx:
        raise BadRequest(
            f"the prompt has at least {floor} tokens, the context window num_ctx is {sampling.num_ctx}",
            hint="raise num_ctx under [sampling], or shorten the prompt",
        )
    return floor


def _wire(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _options(sampling: Sampling) -> dict[str, float]:
    options: dict[str, float] = {
        "num_ctx": sampling.num_ctx,
        "num_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    return options if sampling.seed is None else {**options, "seed": sampling.seed}
