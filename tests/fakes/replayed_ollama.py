"""A server that answers with exchanges recorded from a real Ollama: status, headers, and the very bytes, in the same chunks.

A request is answered by the recorded one of the same method and path whose body it agrees with: every field but the options
equal, and of several the one with most in common. One that was recorded several times is answered in that order, the last answer
for ever. An exchange whose client was cut off is answered before the body is read, and the connection closed.
"""

import http.client
import json
import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parents[1] / "data" / "ollama"
REASONS = http.client.responses
Step = dict[str, Any]


def recorded(scenario: str, *names: str) -> list[Step]:
    """The exchanges of a scenario, or those of these names."""
    steps: list[Step] = json.loads((RECORDED / f"{scenario}.json").read_text(encoding="utf-8"))["steps"]
    return [step for step in steps if step["name"] in names] if names else steps


@contextmanager
def replayed(steps: Sequence[Step]) -> Iterator[str]:
    """The URL of a server that knows these exchanges."""
    server = _Server(steps)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def body_chunks(response: dict[str, Any]) -> list[bytes]:
    """The body as Go wrote it: one object a chunk where it is a stream of them."""
    if "ndjson" in response:
        return [go_json(entry) + b"\n" for entry in response["ndjson"]]
    if "json" in response:
        return [go_json(response["json"])]
    text: bytes = response.get("text", "").encode()
    if response["headers"].get("Content-Type") == "text/event-stream":
        return [event + b"\n\n" for event in text.split(b"\n\n") if event]
    return [text] if text else []


def go_json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    block_on_close = True

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._left = list(steps)
        self._lock = threading.Lock()

    def step_for(self, method: str, path: str, body: dict[str, Any] | bytes | None) -> Step | None:
        """The answer to this request; `body` None: not known yet, only one that is not read fits."""
        with self._lock:
            fits = [step for step in self._left if _agrees(step, method, path, body)]
            if not fits:
                return None
            best = max(fits, key=lambda step: _likeness(step["request"].get("json"), body))
            if [step["request"] for step in fits].count(best["request"]) > 1:
                self._left.remove(best)
            return best


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):
            return  # the client went away

    def _answer(self) -> None:
        method, path, _ = self.rfile.readline().decode().split(" ")
        headers = http.client.parse_headers(self.rfile)
        step = self.server.step_for(method, path, None)
        if step is None:
            data = self.rfile.read(int(headers.get("Content-Length") or 0))
            step = self.server.step_for(method, path, _parsed(data))
        if step is None:
            step = {"response": {"status": 599, "headers": {}, "text": f"{method} {path} was not recorded"}}
        self._send(step["response"], has_body=method != "HEAD")

    def _send(self, response: dict[str, Any], *, has_body: bool) -> None:
        headers = dict(response["headers"])
        chunks = body_chunks(response) if has_body else []
        chunked = headers.get("Transfer-Encoding") == "chunked"
        if has_body and not chunked:
            headers["Content-Length"] = str(sum(map(len, chunks)))
        lines = [f"HTTP/1.1 {response['status']} {REASONS.get(response['status'], '')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.wfile.write("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk)
        if chunked and not response.get("cut"):  # ours, in no recording: the connection breaks in the middle
            self.wfile.write(b"0\r\n\r\n")


def _parsed(data: bytes) -> dict[str, Any] | bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return data
    return value if isinstance(value, dict) else data


def _agrees(step: Step, method: str, path: str, body: dict[str, Any] | bytes | None) -> bool:
    request = step["request"]
    if (request["method"], request["path"]) != (method, path):
        return False
    if body is None:
        return "sending" in step
    if "body" in request:
        return isinstance(body, bytes) and sha256(body).hexdigest() == request["body"]["sha256"]
    if "json" not in request:
        return body == request.get("raw", "").encode()
    wanted = request["json"]
    return isinstance(body, dict) and all(body.get(name) == value for name, value in wanted.items() if name != "options")


def _likeness(wanted: dict[str, Any] | None, body: dict[str, Any] | bytes | None) -> int:
    if wanted is None or not isinstance(body, dict):
        return 0
    options, asked = wanted.get("options", {}), body.get("options", {})
    same = sum(name in wanted and wanted[name] == value for name, value in body.items())
    return same + sum(name in options and options[name] == value for name, value in asked.items())
