"""A model server on loopback that repeats in every error the headers and the address that it was asked with, as careless gateways
do. The first part of a path is the fault, the rest a route of Ollama, Gemini or an OpenAI-compatible server, or of a webhook.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALL_S = 5.0  # longer than any lane of a test waits


class Echoing(ThreadingHTTPServer):
    """It keeps the keys it was sent; `over` ends its stalls."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: Counter[str] = Counter()
        self.keys: set[str] = set()  # that came with any request
        self.prompted: set[str] = set()  # that came with a prompt
        self.notices: list[bytes] = []
        self.over = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Echoing

    def log_message(self, format: str, *args: object) -> None:
        """Said elsewhere."""

    def do_HEAD(self) -> None:
        self._send(200, b"")

    def do_GET(self) -> None:
        if self._fault().startswith("closed"):
            return self._refuse(401)
        self._send(200, json.dumps({"models": [{"name": "models/m", "model": "m"}], "data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self._fault()
        if fault == "hook":
            self.server.notices.append(body)
            return self._send(200, b"")
        self.server.prompted.add(self._key())
        frames = answer(self.path, json.loads(body))
        whole = b"".join(frames)
        match fault:
            case "fine":
                time.sleep(0.02)
                self._send(200, whole)
            case "drop" | "cut" | "stall":
                self._send(200, whole[: len(whole) // 2], length=len(whole) // (2 if fault == "cut" else 1))
                if fault == "stall":
                    self.server.over.wait(STALL_S)
                self.close_connection = True
            case "inside":
                error = json.dumps({"error": {"code": 401, "message": self._echo()}}).encode()
                self._send(200, (frames[0] if len(frames) > 1 else b"") + (b"data: " * (b"data: " in whole)) + error + b"\n\n")
            case "torn":
                self._send(500, f'{{"error": {{"message": "{self._echo()}'.encode())
            case "page":
                self._send(502, f"<html>{self._echo()}</html>".encode())
            case "redirect":
                self._send(307, b"", {"Location": f"http://127.0.0.1:9/?{self._echo()}"})
            case "escaped":
                self._send(401, self._refusal(401).replace("/", "\\/").encode())
            case _:
                self._refuse(int(re.sub(r"\D", "", fault) or 401))

    def _fault(self) -> str:
        fault = self.path.split("/")[1].split("?")[0]
        self.server.asked[fault] += 1
        self.server.keys.add(self._key())
        return fault

    def _key(self) -> str:
        return self.headers.get("x-goog-api-key") or self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _echo(self) -> str:
        return f"{self._key()} is no good model; asked: {self.path} with Authorization: Bearer {self._key()}"

    def _refusal(self, status: int) -> str:
        message = self._echo()
        return json.dumps({"error": message if "/api/" in self.path else {"code": status, "message": message, "status": message}})

    def _refuse(self, status: int) -> None:
        self._send(status, self._refusal(status).encode(), {"Retry-After": "0.2"} if status in (429, 503) else {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


def answer(path: str, asked: dict[str, Any]) -> list[bytes]:
    """The fact of the question, as the API of that path says it: in one piece, or in the two of a stream."""
    fact = re.findall(r"Fact: (.*?)(?:\\n|\")", json.dumps(asked, ensure_ascii=False))[-1]
    documents: list[dict[str, Any]]
    if "/api/chat" in path:
        end = {"done": True, "done_reason": "stop", "prompt_eval_count": 400, "eval_count": 9}
        documents = [{"model": "m", "message": {"role": "assistant", "content": text}} for text in (fact, "")]
        documents[-1] |= end
        whole, before = {**documents[0], **end}, ""
    elif "chat/completions" in path:
        said = {"role": "assistant", "content": fact}
        documents = [{"choices": [{"delta": said}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        whole, before = {"choices": [{"message": said, "finish_reason": "stop"}]}, "data: "
    else:
        content = {"role": "model", "parts": [{"text": fact}]}
        documents = [{"candidates": [{"content": content}]}, {"candidates": [{"finishReason": "STOP"}]}]
        whole, before = {"candidates": [{"content": content, "finishReason": "STOP"}]}, "data: "
    if asked.get("stream") or "streamGenerate" in path:
        return [f"{before}{json.dumps(document)}\n{chr(10) * bool(before)}".encode() for document in documents]
    return [json.dumps(whole).encode()]
