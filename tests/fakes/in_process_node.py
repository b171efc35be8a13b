"""The node's real request handling without a process: a transport that can be told where to break."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from campaigns.sync.transport import OnBytes
from config.contracts.wire import Reply, Request
from config.errors import NodeUnreachable
from trainer_node.rpc import Service


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
        self.spoil: Callable[[Path], None] | None = None  # what happens to a file that was just uploaded

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

    def exchange(self, line: bytes, deadline_s: float) -> bytes:
        assert not self._closed, "a spent transport is used again"
        verb = Request.model_validate_json(line).verb
        self._node.asked.append(verb)
        reply: Reply = self._service.answer(line)
        if self._node.lose_answer_of == verb:
            self._node.lose_answer_of = None
            raise NodeUnreachable("the answer was lost")
        return reply.model_dump_json().encode()

    def upload(self, source: Path, remote_path: str, offset: int, on_bytes: OnBytes) -> None:
        assert not self._closed, "a spent transport is used again"
        data = source.read_bytes()[offset:]
        cut, self._node.cut_upload_after = self._node.cut_upload_after, None
        with open(remote_path, "r+b" if offset else "wb") as target:
            target.seek(offset)
            target.write(data if cut is None else data[:cut])
        on_bytes(len(data) if cut is None else min(cut, len(data)))
        if cut is not None:
            raise NodeUnreachable("cut")
        spoil, self._node.spoil = self._node.spoil, None
        if spoil is not None:
            spoil(Path(remote_path))

    def download(self, remote_path: str, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
        assert not self._closed, "a spent transport is used again"
        data = Path(remote_path).read_bytes()[offset:]
        cut, self._node.cut_download_after = self._node.cut_download_after, None
        target.write(data if cut is None else data[:cut])
        on_bytes(len(data) if cut is None else min(cut, len(data)))
        if cut is not None:
            raise NodeUnreachable("cut")

    @contextmanager
    def tunnel(self, host: str, port: int) -> Iterator[tuple[str, int]]:
        yield host, port

    def close(self) -> None:
        if not self._closed:
            self._service.close()
        self._closed = True
