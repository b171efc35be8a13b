"""The HTTP API of `hafs serve`, with its docs page at /docs, which needs no internet.

- Every error is OpenAI's {"error": {message, type, code}}. One before the first piece of an answer has its own status; a later
  one is the last event of the stream, which then lacks its [DONE].
- A client that hangs up stops the answer, streamed or not, also before its first word.
- Without a key only this machine is served, and no page of a foreign origin: a browser sends Host and Origin.
- Who may not ask, or sends more than a conversation can be, is refused before the body is read.
"""

import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agents.task import Completion
from campaigns.serve_gateway import Gateway
from campaigns.serve_wire import ChatRequest, Reply
from config.errors import BadRequest, HafsError, ModelMissing, Overloaded, ProviderUnavailable, RateLimited

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_BODY_BYTES = 8 * 2**20  # some million tokens
HEALTH_S = 5.0  # whoever asks has little patience
_LEFT = 499  # nginx's word for a client that hung up: nobody reads it
_bearer = HTTPBearer(auto_error=False, description="the API key, where one is set")

T = TypeVar("T")


class Refused(HTTPException):
    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(status, message, {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None)
        self.code = code


def build(gateway: Gateway, api_key: str, num_ctx: int, host: str) -> FastAPI:
    """The application.

    Args:
        api_key: what clients have to send as a bearer token; empty: nothing.
        num_ctx: the context window of every answer, in tokens.
        host: the address that is listened on.
    """

    @asynccontextmanager
    async def opened(_: FastAPI) -> AsyncIterator[None]:
        async with gateway:
            yield

    app: FastAPI = FastAPIOffline(
        title=f"hafs serve: {gateway.model}", description=__doc__, redoc_url=None, lifespan=opened, swagger_ui_parameters={}
    )
    app.add_middleware(_Door, api_key=api_key, names=LOCAL_NAMES | {host})
    app.exception_handler(HTTPException)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HafsError)(_failed)
    app.exception_handler(Exception)(_broken)
    with_key = [Depends(_bearer)]  # for the docs page: the door has seen to it

    @app.post("/v1/chat/completions", dependencies=with_key, summary="Answer a conversation, streamed or not")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        if asked.model and asked.model not in (gateway.model, gateway.model.removesuffix(":latest")):
            raise ModelMissing(f'"{asked.model}" is not served here, but {gateway.model}')
        parts = gateway.told([message.plain() for message in asked.messages], asked.sampling(num_ctx))
        reply = Reply(gateway.model)
        if not asked.stream:
            answer = await _unless_left(request, _whole(parts))
            return _nobody() if answer is None else JSONResponse(reply.whole(answer))
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = _events(parts, reply, with_usage)
        first = await _unless_left(request, anext(events))  # an error up to here has its own status
        if first is None:
            return _nobody()
        return StreamingResponse(_after(first, events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.get("/v1/models", dependencies=with_key, summary="The one model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": gateway.model, "object": "model", "created": 0, "owned_by": "hafs"}]}

    @app.get("/health", summary="Whether the model server answers: 503 where it does not, or not soon")
    async def health() -> dict[str, str]:
        try:
            with anyio.fail_after(HEALTH_S):
                await gateway.alive()
        except TimeoutError:
            raise ProviderUnavailable(f"the model server has not answered within {HEALTH_S:g} s") from None
        return {"status": "ok", "model": gateway.model}

    return app


class _Door:
    """Refuses who may not ask, and what is too long, before a byte of a body is decoded."""

    def __init__(self, app: ASGIApp, api_key: str, names: frozenset[str]) -> None:
        self._app, self._api_key, self._names = app, api_key, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)
        try:
            if request.url.path.startswith("/v1/"):
                self._require_allowed(request)
            _require_short(int(request.headers.get("content-length", 0)))
        except Refused as refused:
            return await (await _refused(request, refused))(scope, receive, send)
        await self._app(scope, _counted(receive), send)

    def _require_allowed(self, request: Request) -> None:
        if self._api_key:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
                raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")
        elif not self._from_here(request):
            raise Refused(403, "only this machine is served without an API key", "forbidden")

    def _from_here(self, request: Request) -> bool:
        origin = request.headers.get("origin")
        return _host(f"//{request.headers.get('host', '')}") in self._names and (origin is None or _host(origin) in self._names)


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # what a browser would never send
        return None


def _require_short(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise Refused(413, f"a request may have {MAX_BODY_BYTES} bytes", "request_too_large")


def _counted(receive: Receive) -> Receive:
    """For a body whose length nobody has said."""
    size = 0

    async def next_part() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        _require_short(size)
        return message

    return next_part


async def _unless_left(request: Request, work: Awaitable[T]) -> T | None:
    """What comes of it; None where the client hung up first, so that it was given up."""
    result: T | None = None
    failed: HafsError | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result = await work
        except HafsError as error:  # raised in here, it would come out as a group
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return result


async def _whole(parts: AsyncGenerator[str | Completion]) -> Completion:
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, Completion):
                return part
    raise AssertionError("an answer ends with all of it")


def _nobody() -> Response:
    return Response(status_code=_LEFT)


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
    assert isinstance(error, HTTPException)
    code = error.code if isinstance(error, Refused) else HTTPStatus(error.status_code).name.lower()
    return JSONResponse(_body(error.detail, code, None), error.status_code, error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(_body(f"the body is no JSON from character {first['loc'][1]} on", "invalid_request", None), 400)
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


async def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse(_body("this is a fault of hafs: its log has more", type(error).__name__, None), 500)


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
