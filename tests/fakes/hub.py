"""A hub on a loopback port that keeps to what a fetch asks of the real one, and can cut a body, gate and lose a repository.

    with Hub({"owner/repo": {"model.gguf": b"…"}}) as hub: …     (HF_ENDPOINT is hub.url)

HEAD and GET /OWNER/REPO/resolve/REVISION/FILE: 302 to a signed address of a storage (another host to a client: localhost), with
X-Repo-Commit, X-Linked-ETag and X-Linked-Size; errors with X-Error-Code and X-Error-Message; the storage knows Range and wants no
token. GET /api/models/OWNER/REPO/revision/REVISION lists the files. A repository that is gated answers 401 without a token, 403
with one that was not let in.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

COMMIT = "1f" * 20
REVISIONS = ("main", "v1", COMMIT)
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
LISTING = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")


class Asked(NamedTuple):
    method: str
    path: str
    range: str
    token: str


class Hub:
    """`asked`: every request. `cuts`: the next bodies of the storage end after so many bytes. `gated`: repositories that only
    `let_in` opens. `renamed`: old name → new name. `down`: so many of the next requests are answered 503.
    """

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repos = {repo: dict(files) for repo, files in repos.items()}
        self.asked: list[Asked] = []
        self.cuts: list[int] = []
        self.gated: set[str] = set()
        self.let_in = "hf_let_in"
        self.renamed: dict[str, str] = {}
        self.down = 0
        self.damaged = False  # the storage gives other bytes than the hub tells
        self.hold_after: int | None = None  # bytes of a body, after which nothing comes until `go_on`
        self.go_on = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def bodies(self) -> list[Asked]:
        """The requests for bytes."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.path.startswith("/storage/")]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path, token = to.path.partition("?")[0], to.headers.get("Authorization", "").removeprefix("Bearer ")
        self.asked.append(Asked(to.command, path, to.headers.get("Range", ""), token))
        if self.down:
            self.down -= 1
            return reply(to, 503, {})
        if path.startswith("/storage/"):
            return self._store(to, path, token)
        if found := LISTING.fullmatch(path):
            return self._list(to, token, **found.groupdict())
        found = RESOLVE.fullmatch(path)
        assert found is not None, path
        self._resolve(to, token, **found.groupdict())

    def _list(self, to: BaseHTTPRequestHandler, token: str, repo: str, revision: str) -> None:
        if repo in self.renamed:
            return reply(to, 307, {"Location": f"/api/models/{self.renamed[repo]}/revision/{revision}"})
        if self._is_refused(to, token, repo, revision):
            return None
        body = json.dumps({"sha": COMMIT, "siblings": [{"rfilename": name} for name in self.repos[repo]]}).encode()
        reply(to, 200, {"Content-Type": "application/json"}, body)

    def _is_refused(self, to: BaseHTTPRequestHandler, token: str, repo: str, revision: str) -> bool:
        if repo not in self.repos:
            refuse(to, 401, "RepoNotFound", "Repository not found")
        elif repo in self.gated and token != self.let_in:
            refuse(to, 403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted")
        elif revision not in REVISIONS:
            refuse(to, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return False
        return True

    def _resolve(self, to: BaseHTTPRequestHandler, token: str, repo: str, revision: str, file: str) -> None:
        if repo in self.renamed:
            return reply(to, 307, {"Location": f"/{self.renamed[repo]}/resolve/{revision}/{file}"})
        if self._is_refused(to, token, repo, revision):
            return None
        if file not in self.repos[repo]:
            return refuse(to, 404, "EntryNotFound", "Entry not found")
        data = self.repos[repo][file]
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        storage = f"http://localhost:{self.port}/storage/{repo}/{file}?signature=secret"
        reply(to, 302, {**headers, "Location": storage})

    def _store(self, to: BaseHTTPRequestHandler, path: str, token: str) -> None:
        assert not token, "a token was sent to a storage"
        owner, repo, file = path.removeprefix("/storage/").split("/", 2)
        data = self.repos[f"{owner}/{repo}"][file]
        begin = int(to.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        body = bytes(len(data)) if self.damaged else data
        to.send_response(206 if begin else 200)
        if begin:
            to.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        to.send_header("Content-Length", str(len(data) - begin))
        to.end_headers()
        self._send(to, body[begin:])

    def _send(self, to: BaseHTTPRequestHandler, body: bytes) -> None:
        to.close_connection = True
        try:
            if self.hold_after is not None:
                to.wfile.write(body[: self.hold_after])
                self.go_on.wait(60)
                body = body[self.hold_after :]
            to.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)
        except (BrokenPipeError, ConnectionResetError):  # who asked was killed
            return


def reply(to: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
    to.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        to.send_header(name, value)
    to.end_headers()
    if to.command != "HEAD":
        to.wfile.write(body)


def refuse(to: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    reply(to, status, {"X-Error-Code": code, "X-Error-Message": message})
