"""The routes that run a model: chat, generate, embed, tokenize.

An answer is made of pieces, sent one by one or gathered. A client that hangs up cancels its handler: the generation stops.
Counts are of the whole prompt, cached or not. Errors before the first piece have their own status; later ones are a line of the
stream.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from trainer_node.machine import cores
from trainer_node.runtime.engine import Engine, EngineSpec, Piece
from trainer_node.runtime.models import ApiError, Model, Store
from trainer_node.runtime.options import field, keep_alive_s, merged_options, schema_of, top_logprobs
from trainer_node.runtime.pool import Pool
from trainer_node.runtime.prompts import Prompts
from trainer_node.runtime.requests import json_body, json_reply, line, stream_reply

TOO_LONG = "the input length exceeds the context length"
UNSUPPORTED = ("suffix", "images", "template", "context")  # of generate; ignoring them would answer another question


@dataclass(frozen=True)
class Order:
    """A checked request: what to run and how to answer. `part` wraps a text as this route does."""

    asked: str  # the model's name as it was asked for
    model: Model
    options: dict[str, Any]
    keep_alive_s: float
    messages: list[dict[str, Any]]
    raw_prompt: str | None
    request: dict[str, Any]  # for llama.cpp
    stream: bool
    with_context: bool
    truncate: bool  # False: a prompt that does not fit is refused, not cut
    part: Callable[[str], dict[str, Any]]


def chat_part(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def generate_part(text: str) -> dict[str, Any]:
    return {"response": text}


class Answers:
    def __init__(self, store: Store, pool: Pool) -> None:
        self._store = store
        self._pool = pool
        self._prompts = Prompts()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await json_body(request)
        if not field(body, "model", str):
            raise ApiError(400, "model is required")
        messages = body.get("messages") or []
        if not isinstance(messages, list):
            kind = "string" if isinstance(messages, str) else "object"
            raise ApiError(400, f"json: cannot unmarshal {kind} into Go struct field ChatRequest.messages of type []api.Message")
        if not messages:
            keep_s = keep_alive_s(body.get("keep_alive"))
            return await self._load_or_unload(body, self._find(body), keep_s, chat_part)
        return await self._answer(request, self.chat_order(body))

    def chat_order(self, body: dict[str, Any]) -> Order:
        """A request of /api/chat with messages, checked. Raises ApiError."""
        keep_s = keep_alive_s(body.get("keep_alive"))
        model = self._find(body)
        self._check_capability(body, model, "chat")
        history = [_message(entry) for entry in [*model.messages, *body["messages"]]]
        if model.system and _message(body["messages"][0])["role"] != "system":
            history = [{"role": "system", "content": model.system}, *history]
        return self._order(body, model, keep_s, chat_part, history, None)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await json_body(request)
        keep_s = keep_alive_s(body.get("keep_alive"))
        model = self._find(body)
        prompt = field(body, "prompt", str)
        if not prompt:
            return await self._load_or_unload(body, model, keep_s, generate_part)
        self._check_capability(body, model, "generate")
        for name in UNSUPPORTED:
            if body.get(name):
                raise ApiError(400, f"{name} is not supported by this server")
        system = field(body, "system", str) or model.system
        history = [{"role": "system", "content": system}] if system else []
        history += [*map(_message, model.messages), {"role": "user", "content": prompt}]
        raw = prompt if body.get("raw") else None
        return await self._answer(request, self._order(body, model, keep_s, generate_part, history, raw))

    async def embed(self, request: web.Request) -> web.Response:
        body = await json_body(request)
        given = body.get("input")
        if not isinstance(given, str | list | None):
            raise ApiError(400, "invalid input type")
        model = self._find(body, 'model "{}" not found, try pulling it first')
        texts = [given] if isinstance(given, str) else given or []
        if not any(texts):
            return json_reply({"model": body["model"], "embeddings": []})
        if body.get("truncate") is False:
            async with self._engine(body["model"], model, _options(body, model), keep_alive_s(body.get("keep_alive"))) as engine:
                for text in texts:
                    if len(await engine.tokenize(str(text))) > engine.spec.num_ctx:
                        raise ApiError(400, TOO_LONG)
        raise ApiError(501, "This server does not support embeddings. Start it with `--embeddings`")

    async def tokenize(self, request: web.Request) -> web.Response:
        """Ours, not Ollama's: {model, prompt} -> {tokens}, as the prompt of a chat is read."""
        body = await json_body(request)
        model = self._find(body)
        self._check_capability(body, model, "tokenize")
        prompt = field(body, "prompt", str)
        async with self._engine(body["model"], model, _options(body, model), keep_alive_s(body.get("keep_alive"))) as engine:
            return json_reply({"tokens": await engine.tokenize(prompt)})

    def _find(self, body: dict[str, Any], missing: str = "model '{}' not found") -> Model:
        name = field(body, "model", str)
        model = self._store.find(name)
        if model is None:
            raise ApiError(404, missing.format(name))
        return model

    def _check_capability(self, body: dict[str, Any], model: Model, what: str) -> None:
        if model.weights is None:
            raise ApiError(400, f'"{body["model"]}" does not support {what}')
        if body.get("tools"):
            raise ApiError(400, f"{model.name.full} does not support tools")
        if body.get("think"):
            raise ApiError(400, f'"{body["model"]}" does not support thinking')

    def _order(
        self,
        body: dict[str, Any],
        model: Model,
        keep_s: float,
        part: Callable[[str], dict[str, Any]],
        messages: list[dict[str, Any]],
        raw_prompt: str | None,
    ) -> Order:
        options = _options(body, model)
        request = {name: value for name, value in options.items() if name not in ("num_ctx", "num_predict", "num_keep")}
        request["n_predict"] = min(options["num_predict"], 2**31 - 1)  # what llama.cpp counts in
        schema = schema_of(body.get("format"))
        if schema is not None:
            request["json_schema"] = schema
        if body.get("logprobs"):
            request["n_probs"] = max(1, top_logprobs(body))
        return Order(
            asked=body["model"],
            model=model,
            options=options,
            keep_alive_s=keep_s,
            messages=messages,
            raw_prompt=raw_prompt,
            request=request,
            stream=body.get("stream") is not False,
            with_context=part is generate_part and raw_prompt is None,
            truncate=body.get("truncate") is not False,
            part=part,
        )

    @asynccontextmanager
    async def _engine(self, asked: str, model: Model, options: dict[str, Any], keep_s: float) -> AsyncIterator[Engine]:
        if model.weights is None:
            raise ApiError(400, f'"{asked}" does not support generate')
        trained = int(model.config.get("context_length") or 0)
        num_ctx = max(4, min(options["num_ctx"], trained or options["num_ctx"]))
        adapters = tuple(map(str, model.adapters))
        spec = EngineSpec(str(model.weights), adapters, num_ctx, self._pool.limits.parallel, cores())
        async with self._pool.use(model, spec, keep_s) as engine:
            yield engine

    async def _load_or_unload(
        self, body: dict[str, Any], model: Model, keep_s: float, part: Callable[[str], dict[str, Any]]
    ) -> web.Response:
        if keep_s == 0.0:
            await self._pool.unload(model.name, model.weights)
            reason = "unload"
        else:
            async with self._engine(body["model"], model, _options(body, model), keep_s):
                reason = "load"
        return json_reply({"model": body["model"], "created_at": _now(), **part(""), "done": True, "done_reason": reason})

    async def _answer(self, request: web.Request, order: Order) -> web.StreamResponse:
        chunks = self.chunks(order)
        try:
            first = await anext(chunks)  # errors up to here have their own status
            if not order.stream:
                return json_reply(await _gathered(first, chunks, order))
            response = await stream_reply(request)
            await response.write(line(first))
            try:
                async for chunk in chunks:
                    await response.write(line(chunk))
            except ApiError as error:
                await response.write(line({"error": str(error)}))
            return response
        finally:
            await chunks.aclose()

    async def chunks(self, order: Order) -> AsyncGenerator[dict[str, Any]]:
        """The answer as objects of Ollama's stream, the last with `done: true`."""
        started = time.monotonic_ns()
        head = {"model": order.asked}
        async with self._engine(order.asked, order.model, order.options, order.keep_alive_s) as engine:
            loaded = time.monotonic_ns()
            whole = await self._prompt(engine, order)
            prompt = cut(whole, engine.spec.num_ctx, order.options["num_keep"])
            if len(prompt) < len(whole) and not order.truncate:
                raise ApiError(400, TOO_LONG)
            answer = ""
            pieces = engine.complete(prompt, order.request, stream=order.stream)
            try:
                async for piece in pieces:
                    answer += piece.text
                    logprobs = {"logprobs": piece.logprobs} if piece.logprobs and "n_probs" in order.request else {}
                    if not piece.done_reason:
                        if piece.text:
                            yield {**head, "created_at": _now(), **order.part(piece.text), "done": False, **logprobs}
                        continue
                    context = {"context": prompt + await engine.tokenize_text(answer)} if order.with_context else {}
                    end = {"done": True, "done_reason": piece.done_reason, **context}
                    counts = _counts(started, loaded, len(prompt), piece)
                    yield {**head, "created_at": _now(), **order.part(piece.text), **end, **counts, **logprobs}
            finally:
                await pieces.aclose()

    async def _prompt(self, engine: Engine, order: Order) -> list[int]:
        if order.raw_prompt is not None:
            return await engine.tokenize(order.raw_prompt)
        return await self._prompts.tokens(engine, order.model, order.messages)


def _options(body: dict[str, Any], model: Model) -> dict[str, Any]:
    return merged_options(model.parameters, field(body, "options", dict))


def _message(entry: Any) -> dict[str, str]:
    """What a template is told. Raises ApiError (400)."""
    if not isinstance(entry, dict):
        raise ApiError(400, "json: cannot unmarshal a message: an object is expected")
    if entry.get("images"):
        raise ApiError(400, "images are not supported by this server")
    return {"role": field(entry, "role", str), "content": field(entry, "content", str)}


def cut(tokens: list[int], num_ctx: int, num_keep: int) -> list[int]:
    """A prompt that fills the context loses its middle, as in Ollama: the first `num_keep` tokens and half a context stay."""
    if len(tokens) < num_ctx:
        return tokens
    kept = max(0, min(num_keep, num_ctx - 4))
    return tokens[:kept] + tokens[-((num_ctx - kept) // 2) :]


async def _gathered(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]], order: Order) -> dict[str, Any]:
    all_chunks = [first, *[chunk async for chunk in chunks]]
    texts = [chunk["message"]["content"] if "message" in chunk else chunk["response"] for chunk in all_chunks]
    logprobs = [entry for chunk in all_chunks for entry in chunk.get("logprobs", [])]
    return all_chunks[-1] | order.part("".join(texts)) | ({"logprobs": logprobs} if logprobs else {})


def _counts(started: int, loaded: int, prompt_tokens: int, last: Piece) -> dict[str, int]:
    return {
        "total_duration": time.monotonic_ns() - started,
        "load_duration": loaded - started,
        "prompt_eval_count": prompt_tokens,
        "prompt_eval_duration": last.prompt_eval_ns,
        "eval_count": last.eval_count,
        "eval_duration": last.eval_ns,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
