"""The node's real request handling without a process: a transport that can be told where to break."""

import io
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from campaigns.sync.transport import OnBytes
from campaigns.sync.tunnel import Channel
from config.contracts.wire import Reply, Request
from config.errors import NodeUnreachable
from trainer_node.rpc import RequestBody, Service


class InProcessNode:
    """A node's folder and what was asked of it. `dial` is what a Node is made with; each fault happens once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.dialled = 0
        self.cut_upload_after: int | None = None
        self.cut_download_after: int | None = None
        self.lose_answer_of: str | None = None
        self.down = 0  # how many times dialling fails
        self.spoil: Callable[[bytes], bytes] | None = None  # what becomes of the bytes of an upload

    def dial(self) -> "InProcessTransport":
        if self.down:
            self.down -= 1
            raise NodeUnreachable("the node is off")
        self.dialled += 1
        return InProcessTransport(self)


class InProcessTransport:
    def __init__(self, node: InProcessNode) -> None:
        self._node = node
        self._service = Service(node.root)
        self._closed = False
        self._answers: deque[bytes | None] = deque()

    def exchange(self, line: bytes, deadline_s: float) -> bytes:
        assert not self._closed, "a spent transport is used again"
        answer = self._serve(line, b"")
        if answer is None:
            raise NodeUnreachable("the answer was lost")
        return answer

    def _serve(self, line: bytes, body: bytes) -> bytes | None:
        verb = Request.model_validate_json(line).verb
        self._node.asked.append(verb)
        reply: Reply = self._service.answer(line, lambda size: RequestBody(io.BytesIO(body), size, lambda _: None))
        if self._node.lose_answer_of == verb:
            self._node.lose_answer_of = None
            return None
        return reply.model_dump_json().encode()

    def send(self, line: bytes, body: BinaryIO | None, on_bytes: OnBytes) -> None:
        assert not self._closed, "a spent transport is used again"
        data = body.read() if body else b""
        cut, self._node.cut_upload_after = self._node.cut_upload_after, None
        spoil, self._node.spoil = self._node.spoil, None
        sent = data if cut is None else data[:cut]
        on_bytes(len(sent))
        self._answers.append(self._serve(line, spoil(sent) if spoil else sent))
        if cut is not None:
            raise NodeUnreachable("cut")

    def receive(self, deadline_s: float) -> bytes:
        assert not self._closed, "a spent transport is used again"
        answer = self._answers.popleft()
        if answer is None:
            raise NodeUnreachable("the answer was lost")
        return answer

    def download(self, remote_path: str, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
        assert not self._closed, "a spent transport is used again"
        data = Path(remote_path).read_bytes()[offset:]
        cut, self._node.cut_download_after = self._node.cut_download_after, None
        target.write(data if cut is None else data[:cut])
        on_bytes(len(data) if cut is None else min(cut, len(data)))
        if cut is not None:
            raise NodeUnreachable("cut")

    def channel(self, host: str, port: int) -> Channel:
        raise NotImplementedError

    def close(self) -> None:
        if not self._closed:
            self._service.close()
        self._closed = True
