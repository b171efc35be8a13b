"""How requests are read and answers framed: what Ollama's clients expect byte for byte.

Only this machine is served: a Host that is not loopback (DNS rebinding) or a foreign Origin (a web page) is answered 403.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from config.errors import HafsError
from trainer_node.runtime.models import ApiError

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
JSON_TYPE = "application/json; charset=utf-8"
MAX_BODY_BYTES = 64 * 2**20  # of JSON; blobs are streamed


async def json_body(request: web.Request) -> dict[str, Any]:
    """Raises ApiError (400) for a body that is missing, no JSON or no object."""
    data = await request.read()
    if not data:
        raise ApiError(400, "missing request body")
    try:
        body = json.loads(data)
    except ValueError as error:
        raise ApiError(400, _json_mistake(error)) from error
    if not isinstance(body, dict):
        raise ApiError(400, "json: cannot unmarshal the request: an object is expected")
    return body


def _json_mistake(error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError) or error.pos >= len(error.doc):
        return "unexpected EOF"
    where = "object key string" if "property name" in error.msg else "value"
    return f"invalid character '{error.doc[error.pos]}' looking for beginning of {where}"


def json_reply(value: Any, status: int = 200, content_type: str = JSON_TYPE) -> web.Response:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return web.Response(status=status, body=data, headers={"Content-Type": content_type})


async def ndjson_reply(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    return response


def line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def is_local(host: str) -> bool:
    """Whether a Host header or the network location of an Origin names this machine."""
    try:
        return (urlsplit(f"//{host}").hostname or "") in LOOPBACK
    except ValueError:
        return False


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    origin = request.headers.get("Origin")
    if not is_local(request.headers.get("Host", "")) or (origin is not None and not is_local(urlsplit(origin).netloc)):
        return web.Response(status=403)
    return await handler(request)


@web.middleware
async def translate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors become the answers that Ollama gives."""
    try:
        return await handler(request)
    except ApiError as error:
        return json_reply({"error": str(error)}, error.status)
    except HafsError as error:  # a full disk
        return json_reply({"error": str(error)}, 500)
    except web.HTTPNotFound:
        return _plain(404, "404 page not found")
    except web.HTTPMethodNotAllowed as error:
        return _plain(405, "405 method not allowed", Allow=", ".join(sorted(error.allowed_methods - {"HEAD"})))


def _plain(status: int, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, body=text.encode(), headers={"Content-Type": "text/plain", **headers})
