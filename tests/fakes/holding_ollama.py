"""An Ollama that holds models in memory, as the recorded server does: an unload is answered at once, and carried out once the
model is idle. In this process, on a loopback port; OLLAMA_HOST is its `url`.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CREATED = "2026-01-01T00:00:00Z"


class HoldingOllama:
    """`loaded`: what ps lists. `busy`: those of them that a request uses. `gone`: those that were deleted while they were loaded.
    `asked`: the models that were to be unloaded, as often as it was asked. `broken`: ps is answered 500.
    """

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.busy: set[str] = set()
        self.gone: set[str] = set()
        self.asked: list[str] = []
        self.looks = 0
        self.broken = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> "HoldingOllama":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def finish(self, model: str) -> None:
        """The request that used the model has ended."""
        self.busy.discard(model)
        if model in self.asked:
            self.loaded.remove(model)

    def ps(self) -> tuple[int, dict[str, Any]]:
        self.looks += 1
        if self.broken:
            return 500, {"error": "out of order"}
        rest = {
            "size": 210690374,
            "digest": "0" * 64,
            "details": {},
            "expires_at": CREATED,
            "size_vram": 0,
            "context_length": 4096,
        }
        return 200, {"models": [{"name": name, "model": name, **rest} for name in self.loaded]}

    def generate(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        model = body["model"]
        assert body == {"model": model, "keep_alive": 0}, "nothing is asked here but to unload"
        if model in self.gone:
            return 404, {"error": f"model '{model}' not found"}
        self.asked.append(model)
        if model in self.loaded and model not in self.busy:
            self.loaded.remove(model)
        return 200, {"model": model, "created_at": CREATED, "response": "", "done": True, "done_reason": "unload"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        ollama = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(*(ollama.ps() if self.path == "/api/ps" else (200, {"version": "0.33.0"})))

            def do_POST(self) -> None:
                self._reply(*ollama.generate(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

            def _reply(self, status: int, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
