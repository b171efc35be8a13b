"""The way to a server of a node: found again after a failure, and left alone for a while where there is none."""

import socket
import threading
from collections.abc import Iterator

import pytest

from campaigns.sync import tunnel as module
from campaigns.sync.tunnel import Channel, tunnel
from config.errors import NodeUnreachable, ProviderUnavailable


class Pipe:
    """A channel whose far end is a socket of the test."""

    def __init__(self) -> None:
        self._near, self.far = socket.socketpair()
        self.recv = self._near.recv
        self.sendall = self._near.sendall

    def shutdown_write(self) -> None:
        self._near.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        try:
            self._near.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        finally:
            self._near.close()


class Node:
    """Echoes what comes at the place where its server is."""

    def __init__(self) -> None:
        self.name, self.here = "box", False
        self.place = ("127.0.0.1", 1)
        self.errors: list[Exception] = []
        self.searches = self.pings = 0
        self.lost = False
        self.pipes: list[Pipe] = []
        self.ended = threading.Event()  # the far side of one channel

    def channel(self, host: str, port: int) -> Channel:
        if self.errors:
            raise self.errors.pop()
        if (host, port) != self.place:
            raise ProviderUnavailable(f"nothing at {host}:{port}")
        pipe = Pipe()
        self.pipes.append(pipe)
        threading.Thread(target=self._echo, args=(pipe,), daemon=True).start()
        return pipe

    def ping(self) -> None:
        self.pings += 1

    def find(self) -> str:
        self.searches += 1
        if self.lost:
            raise NodeUnreachable("box is off")
        return f"http://{self.place[0]}:{self.place[1]}"

    def _echo(self, pipe: Pipe) -> None:
        while data := pipe.far.recv(1000):
            pipe.far.sendall(data)
        pipe.far.close()
        self.ended.set()


def asked(url: str) -> bytes:
    """What comes back for a word; empty where the connection is closed."""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as client:
        try:
            client.sendall(b"word")
            return client.recv(4)
        except ConnectionError:
            return b""


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    for pipe in node.pipes:
        pipe.close()
        pipe.far.close()


def test_a_server_of_this_machine_needs_none(node: Node) -> None:
    node.here = True
    with tunnel(node, "http://127.0.0.1:9/api", node.find) as url:
        assert url == "http://127.0.0.1:9/api"


def test_what_is_sent_comes_back_and_ends_with_the_block(node: Node) -> None:
    with tunnel(node, "http://127.0.0.1:1", node.find) as url:
        assert asked(url) == b"word" and node.searches == 0
    with pytest.raises(OSError):
        asked(url)


def test_a_lost_connection_and_a_server_that_moved_are_found_again(node: Node) -> None:
    with tunnel(node, "http://127.0.0.1:1", node.find) as url:
        node.errors.append(NodeUnreachable("cut"))
        assert asked(url) == b"word" and node.searches == 1
        node.place = ("127.0.0.1", 2)
        assert asked(url) == b"word" and node.searches == 2
        assert asked(url) == b"word" and node.searches == 2


def test_a_node_that_is_off_is_looked_for_once_in_a_while(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with tunnel(node, "", node.find) as url:
        node.lost = True
        assert [asked(url) for _ in range(5)] == [b""] * 5 and node.searches == 1
        clock[0] += 0.6
        assert asked(url) == b"" and node.searches == 2
        node.lost = False
        assert asked(url) == b"" and node.searches == 2, "the pause has doubled"
        clock[0] += 1.1
        assert asked(url) == b"word" and node.searches == 3


def test_it_is_pinged_while_the_block_lasts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_EVERY_S", 0.01)
    pinged = threading.Event()
    monkeypatch.setattr(node, "ping", pinged.set)
    with tunnel(node, "http://127.0.0.1:1", node.find):
        assert pinged.wait(20)


def test_a_client_that_breaks_off_ends_its_channel(node: Node) -> None:
    with tunnel(node, "http://127.0.0.1:1", node.find) as url:
        client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20)
        client.sendall(b"word")
        assert client.recv(4) == b"word"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # closing resets
        client.close()
        assert node.ended.wait(20), "its server would go on answering"
