"""How requests are read and answers framed: what Ollama's clients expect byte for byte.

A short JSON answer tells its length, one that outgrows the buffer of Go's server is chunked, an empty one has no type.
Only this machine is served: a Host that is not loopback (DNS rebinding) or a foreign Origin (a web page) is answered 403.
"""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from config.errors import HafsError
from trainer_node.runtime.models import ApiError

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
JSON_TYPE = "application/json; charset=utf-8"
MAX_BODY_BYTES = 64 * 2**20  # of JSON; blobs are streamed
WHOLE_BYTES = 2048  # what Go's server holds back to learn the length
OPENAI_PREFIX = "/v1/"
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a character


async def json_body(request: web.Request) -> dict[str, Any]:
    """Raises ApiError (400) for a body that is missing, no JSON or no object."""
    data = await request.read()
    if not data:
        raise ApiError(400, "missing request body")
    try:
        body = _parsed(data.decode(errors="replace"))
    except RecursionError as error:
        raise ApiError(400, "exceeded max depth") from error
    except ValueError as error:
        raise ApiError(400, _json_mistake(error)) from error
    if not isinstance(body, dict):
        raise ApiError(400, "json: cannot unmarshal the request: an object is expected")
    return body


def _parsed(text: str) -> Any:
    """Without halves of characters, as Go reads it: JavaScript sends them where it cuts a text, and nothing can encode them."""
    body = json.loads(text, parse_constant=_no_number)
    if not HALF.search(text):
        return body
    return json.loads(json.dumps(body, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _no_number(name: str) -> float:
    """NaN and Infinity, which Python takes."""
    raise ApiError(400, f"invalid character '{name[0]}' looking for beginning of value")


def _json_mistake(error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error}"
    if error.pos >= len(error.doc):
        return "unexpected EOF"
    where = "object key string" if "property name" in error.msg else "value"
    return f"invalid character '{error.doc[error.pos]}' looking for beginning of {where}"


def json_reply(value: Any, status: int = 200, content_type: str = JSON_TYPE, *, chunked: bool = False) -> web.Response:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    response = web.Response(status=status, body=data, headers={"Content-Type": content_type})
    if chunked or len(data) > WHOLE_BYTES:
        response.enable_chunked_encoding()
    return response


def error_reply(request: web.Request, status: int, text: str) -> web.Response:
    """An error, as the API that was asked tells it."""
    if not request.path.startswith(OPENAI_PREFIX):
        return json_reply({"error": text}, status)
    return json_reply(openai_error(status, text), status, "application/json")


def openai_error(status: int, text: str) -> dict[str, Any]:
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}


async def stream_reply(request: web.Request, content_type: str = "application/x-ndjson") -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    return response


def line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    return is_local_origin(f"//{host}")


def is_local_origin(origin: str) -> bool:
    """Whether an Origin header names this machine; "null", which any page can send, names none."""
    try:
        return (urlsplit(origin).hostname or "") in LOOPBACK
    except ValueError:
        return False


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    origin = request.headers.get("Origin")
    if not is_local(request.headers.get("Host", "")) or (origin is not None and not is_local_origin(origin)):
        return web.Response(status=403)
    return await handler(request)


@web.middleware
async def translate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors become the answers that Ollama gives."""
    try:
        return await handler(request)
    except ApiError as error:
        return error_reply(request, error.status, str(error))
    except HafsError as error:  # a full disk
        return error_reply(request, 500, "; ".join(filter(None, (str(error), error.hint))))
    except web.HTTPRequestEntityTooLarge:
        return error_reply(request, 413, f"the request body is larger than {MAX_BODY_BYTES // 2**20} MiB")
    except web.HTTPNotFound:
        return _plain(404, "404 page not found")
    except web.HTTPMethodNotAllowed as error:
        return _plain(405, "405 method not allowed", Allow=", ".join(sorted(error.allowed_methods - {"HEAD"})))


def _plain(status: int, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, body=text.encode(), headers={"Content-Type": "text/plain", **headers})
