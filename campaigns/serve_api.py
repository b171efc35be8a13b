"""The HTTP API of `hafs serve`, with its docs page at /docs, which needs no internet.

- Every error is OpenAI's {"error": {message, type, code}}. One before the first piece of an answer has its own status; a later
  one is the last event of the stream, which then lacks its [DONE].
- A client that hangs up stops the answer, streamed or not.
- Without a key only this machine is served, and no page of a foreign origin: a browser sends Host and Origin.
"""

import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline

from agents.task import Completion
from campaigns.serve_gateway import Gateway
from campaigns.serve_wire import ChatRequest, Reply
from config.errors import BadRequest, HafsError, ModelMissing, Overloaded, ProviderUnavailable, RateLimited

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
_LEFT = 499  # nginx's word for a client that hung up: nobody reads it
_bearer = HTTPBearer(auto_error=False, description="the API key, where one is set")


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def build(gateway: Gateway, api_key: str, num_ctx: int) -> FastAPI:
    """The application.

    Args:
        api_key: what clients have to send as a bearer token; empty: nothing.
        num_ctx: the context window of every answer, in tokens.
    """

    @asynccontextmanager
    async def opened(_: FastAPI) -> AsyncIterator[None]:
        async with gateway:
            yield

    app: FastAPI = FastAPIOffline(
        title=f"hafs serve: {gateway.model}", description=__doc__, redoc_url=None, lifespan=opened, swagger_ui_parameters={}
    )
    allowed = Depends(_guard(api_key))
    app.exception_handler(Refused)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HafsError)(_failed)

    @app.post("/v1/chat/completions", dependencies=[allowed], summary="Answer a conversation, streamed or not")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        if asked.model and asked.model not in (gateway.model, gateway.model.removesuffix(":latest")):
            raise ModelMissing(f'"{asked.model}" is not served here, but {gateway.model}')
        messages = [message.plain() for message in asked.messages]
        parts = gateway.told(messages, asked.sampling(num_ctx))
        reply = Reply(gateway.model)
        if not asked.stream:
            return await _unless_left(request, parts, reply)
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = _events(parts, reply, with_usage)
        first = await anext(events)  # an error up to here has its own status
        return StreamingResponse(_after(first, events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.get("/v1/models", dependencies=[allowed], summary="The one model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": gateway.model, "object": "model", "created": 0, "owned_by": "hafs"}]}

    @app.get("/health", summary="Whether the model server answers")
    async def health() -> dict[str, str]:
        await gateway.alive()
        return {"status": "ok", "model": gateway.model}

    return app


def _guard(api_key: str) -> Callable[..., None]:
    def allow(request: Request, sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
        if api_key:
            if sent is None or not hmac.compare_digest(sent.credentials.encode(), api_key.encode()):
                raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")
        elif not _from_here(request):
            raise Refused(403, "only this machine is served without an API key", "forbidden")

    return allow


def _from_here(request: Request) -> bool:
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    origin = request.headers.get("origin")
    return host in LOCAL_NAMES and (origin is None or urlsplit(origin).hostname in LOCAL_NAMES)


async def _unless_left(request: Request, parts: AsyncGenerator[str | Completion], reply: Reply) -> Response:
    """The whole answer; given up as soon as the client hangs up."""
    answer: Completion | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        failed: HafsError | None = None
        try:
            async with aclosing(parts):
                async for part in parts:
                    answer = part if isinstance(part, Completion) else answer
        except HafsError as error:  # raised out here, it would come as a group
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return Response(status_code=_LEFT) if answer is None else JSONResponse(reply.whole(answer))


async def _events(parts: AsyncGenerator[str | Completion], reply: Reply, with_usage: bool) -> AsyncGenerator[str]:
    """Server-sent events; raises what comes before the first piece, and tells what comes after it."""
    begun = False
    try:
        async with aclosing(parts):
            async for part in parts:
                if not begun:
                    yield _event(reply.piece({"role": "assistant", "content": ""}))
                    begun = True
                if isinstance(part, str):
                    yield _event(reply.piece({"content": part}))
                    continue
                yield _event(reply.piece({}, part.finish_reason))
                if with_usage:
                    yield _event(reply.usage(part))
        yield "data: [DONE]\n\n"
    except HafsError as error:
        if not begun:
            raise
        yield _event(_body(str(error), type(error).__name__, None))


async def _after(first: str, events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def _body(message: str, code: str, parameter: str | None) -> dict[str, Any]:
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error" if parameter else "hafs_error",
            "code": code,
            "param": parameter,
        }
    }


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(_body(str(error), error.code, None), error.status)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return JSONResponse(_body(f"{where}: {first['msg']}", "invalid_request", where), 400)


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, HafsError)
    message = f"{error} ({error.hint})" if error.hint else str(error)
    parameter = error.parameter if isinstance(error, BadRequest) else ""
    headers = {}
    if isinstance(error, RateLimited | ProviderUnavailable) and error.retry_after_s is not None:
        headers["Retry-After"] = str(round(error.retry_after_s))
    return JSONResponse(_body(message, type(error).__name__, parameter or None), status_of(error), headers)


def status_of(error: HafsError) -> int:
    match error:
        case ModelMissing():
            return 404
        case BadRequest():
            return 400
        case RateLimited():
            return 429
        case Overloaded() | ProviderUnavailable():
            return 503
    return 502
