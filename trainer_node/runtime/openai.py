"""OpenAI's chat API over the same models: /v1/models and /v1/chat/completions, as Ollama has them.

A request becomes one of /api/chat, the objects of its answer become OpenAI's. Where OpenAI has a default for a sampling parameter
(temperature, top_p), it wins over the model's own.
"""

import json
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from trainer_node.runtime.answers import Answers
from trainer_node.runtime.models import ApiError, Model, Store
from trainer_node.runtime.options import field
from trainer_node.runtime.requests import json_body, json_reply, openai_error, stream_reply

JSON = "application/json"
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}
SAME = ("seed", "temperature", "top_p", "frequency_penalty", "presence_penalty")


class OpenAi:
    def __init__(self, store: Store, answers: Answers) -> None:
        self._store = store
        self._answers = answers

    async def models(self, request: web.Request) -> web.Response:
        return json_reply({"object": "list", "data": [_model(model) for model in self._store.models()]}, 200, JSON)

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        model = self._store.find(name)
        if model is None:
            raise ApiError(404, f"model '{name}' not found")
        return json_reply(_model(model), 200, JSON)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await json_body(request)
        order = self._answers.chat_order(chat_request(body))
        head = {"id": f"chatcmpl-{random.randrange(1000)}", "created": int(time.time())}
        head |= {"model": order.asked, "system_fingerprint": "fp_ollama"}
        async with aclosing(self._answers.chunks(order)) as chunks:
            first = await anext(chunks)  # errors up to here have their own status
            if body.get("stream"):
                usage = bool(field(body, "stream_options", dict).get("include_usage"))
                return await _streamed(request, first, chunks, head, usage)
            every = [first, *[chunk async for chunk in chunks]]
        message = {"role": "assistant", "content": "".join(chunk["message"]["content"] for chunk in every)}
        choice = {"index": 0, "message": message, **_logprobs(every), "finish_reason": every[-1]["done_reason"]}
        return json_reply({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(every[-1])}, 200, JSON)


def chat_request(body: dict[str, Any]) -> dict[str, Any]:
    """The same request for /api/chat. Raises ApiError (400)."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "[] is too short - 'messages'")
    options = DEFAULTS | {name: body[name] for name in SAME if body.get(name) is not None}
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    options |= {"num_predict": limit} if limit else {}
    if stop := body.get("stop"):
        options["stop"] = [stop] if isinstance(stop, str) else stop
    asked: dict[str, Any] = {"options": options, "format": _format(body), "stream": bool(body.get("stream"))}
    asked |= {name: body[name] for name in ("model", "tools", "logprobs", "top_logprobs", "keep_alive") if name in body}
    return asked | {"messages": [_message(entry) for entry in messages]}


def _message(entry: Any) -> dict[str, Any]:
    """With the parts of a content that comes in parts joined."""
    if not isinstance(entry, dict):
        raise ApiError(400, "invalid message format")
    content = entry.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ApiError(400, "only parts of type text are supported by this server")
        content = "\n".join(str(part.get("text") or "") for part in content)
    return {"role": entry.get("role"), "content": content}


def _format(body: dict[str, Any]) -> Any:
    asked = field(body, "response_format", dict)
    if asked.get("type") == "json_schema":
        return field(asked, "json_schema", dict).get("schema")
    return "json" if asked.get("type") == "json_object" else None


async def _streamed(
    request: web.Request, first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any]], head: dict[str, Any], usage: bool
) -> web.StreamResponse:
    response = await stream_reply(request, "text/event-stream")
    head = head | {"object": "chat.completion.chunk"}

    async def send(choices: list[dict[str, Any]], **more: Any) -> None:
        await response.write(_event({**head, "choices": choices, **more}))

    delta: dict[str, Any] = {"role": "assistant"}
    chunk = first
    try:
        while not chunk["done"]:
            delta |= {"content": chunk["message"]["content"]}
            await send([{"index": 0, "delta": delta, **_logprobs([chunk]), "finish_reason": None}])
            delta = {}
            chunk = await anext(chunks)
    except ApiError as error:
        await response.write(_event(openai_error(error.status, str(error))))
        return response
    if text := chunk["message"]["content"]:
        delta |= {"content": text}
    await send([{"index": 0, "delta": delta, "finish_reason": chunk["done_reason"]}])
    if usage:
        await send([], usage=_usage(chunk))
    await response.write(b"data: [DONE]\n\n")
    return response


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _logprobs(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    content = [entry for chunk in chunks for entry in chunk.get("logprobs", [])]
    return {"logprobs": {"content": content}} if content else {}


def _usage(last: dict[str, Any]) -> dict[str, int]:
    prompt, completion = last["prompt_eval_count"], last["eval_count"]
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _model(model: Model) -> dict[str, Any]:
    created = int(model.modified.timestamp())
    return {"id": str(model.name), "object": "model", "created": created, "owned_by": model.name.namespace}
