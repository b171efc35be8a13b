"""The laptop's side over a real OpenSSH server and the real node command."""

import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from campaigns.sync import push as push_module
from campaigns.sync import remote, sealed_before, ssh
from campaigns.sync.hostkeys import HostKey
from campaigns.sync.push import push
from campaigns.sync.remote import connect
from campaigns.sync.seal import SealedDataset, seal
from campaigns.sync.ssh import fetch_host_key, trust
from campaigns.sync.tunnel import tunnel
from config.contracts.sample import Provenance, Sample
from config.contracts.wire import STATUS, JobArgs
from config.errors import ConfigError, HostKeyRefused, JobNotFound, NodeUnreachable, ProtocolError, TransferError
from config.settings import LOCAL, Settings
from tests.fakes.ports import free_port
from tests.fakes.relay import Relay
from tests.fakes.sshd import PrivateSshd, make_key, write_ssh

pytestmark = [pytest.mark.integration, pytest.mark.needs("sshd"), pytest.mark.needs("ssh")]

NODE_COMMAND = Path(sys.executable).parent / "hafs-node"


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSshd]:
    with PrivateSshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


AddNode = Callable[..., Settings]


@pytest.fixture
def add_node(sshd: PrivateSshd, home: Path, tmp_path: Path) -> AddNode:
    """Writes nodes.toml with the node `box`, and trusts its key unless told otherwise."""

    def add(port: int = 0, command: str = str(NODE_COMMAND), known: bool = True, **changes: str) -> Settings:
        settings = Settings(home=home)
        home.mkdir(exist_ok=True)
        values = {
            "host": "127.0.0.1",
            "user": sshd.user,
            "identity": str(sshd.identity),
            "root": str(tmp_path / "node"),
            **changes,
        }
        lines = [f'{key} = "{value}"' for key, value in {**values, "command": command}.items()]
        text = "\n".join(["[nodes.box]", f"port = {port or sshd.port}", *lines]) + "\n"
        settings.nodes_file.write_text(text)
        if known:
            trust(settings, "box", fetch_host_key(settings, "box"))
        return settings

    return add


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SealedDataset:
    """Five segments of about half a megabyte, packed."""
    return sealed_of(tmp_path, monkeypatch, rows=1300, segment_bytes=2**20)


def sealed_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, segment_bytes: int) -> SealedDataset:
    monkeypatch.setattr(sealed_before, "SEGMENT_BYTES", segment_bytes)
    chance = random.Random(0)
    path = tmp_path / "samples.jsonl"
    with path.open("wb") as file:
        for number in range(rows):
            row = Sample(
                id=str(number),
                domain="asm",
                source_id="s",
                messages=[],
                completion=chance.randbytes(2000).hex(),
                provenance=Provenance(campaign="c", task_id="t"),
            )
            file.write(row.model_dump_json().encode() + b"\n")
    return seal([("c", path)], "samples", "set", tmp_path / "sealed")


def ignore(done: int, total: int) -> None:
    """Progress nobody looks at."""


def total(sealed: SealedDataset) -> int:
    return sum(segment.packed_bytes for segment in sealed.manifest.segments)


def test_a_push_arrives_whole_and_the_second_sends_nothing(add_node: AddNode, sealed: SealedDataset, tmp_path: Path) -> None:
    settings = add_node()
    with connect(settings, "box") as node:
        first = push(node, sealed, ignore)
        second = push(node, sealed, ignore)
    assert first.new and first.sent_bytes == total(sealed)
    assert not second.new and second.sent_bytes == 0
    for file, segment in zip(sealed.files, sealed.manifest.segments, strict=True):
        assert (tmp_path / "node" / "segments" / f"{segment.sha256}.jsonl.zst").read_bytes() == file.read_bytes()


def test_this_machine_is_a_node_too(home: Path, sealed: SealedDataset) -> None:
    settings = Settings(home=home)
    with connect(settings, LOCAL) as node:
        assert push(node, sealed, ignore).rows == 1300
        with pytest.raises(JobNotFound, match="local: no job"):
            node.call(STATUS, JobArgs(job="nope-1"))
    assert (settings.node_root / "datasets" / f"{sealed.manifest.id}.json").exists()


def through(add_node: AddNode, relay: Relay, sshd: PrivateSshd) -> Settings:
    """The node behind a relay whose first connection is still to come."""
    settings = add_node(port=relay.port, known=False)
    kind, base64 = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
    trust(settings, "box", HostKey(f"[127.0.0.1]:{relay.port}", kind, base64))
    return settings


def test_a_push_cut_in_the_middle_goes_on(
    sshd: PrivateSshd, add_node: AddNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = sealed_of(tmp_path, monkeypatch, rows=8000, segment_bytes=2**22)
    with Relay(sshd.port, cut_after=total(sealed) // 2) as relay:
        with connect(through(add_node, relay, sshd), "box") as node:
            result = push(node, sealed, ignore)
        assert relay.connections == 2
        # what an sshd still held when it was cut, 2 MiB at most, is sent again; begun from zero it would be half as much again
        assert result.new and relay.passed < total(sealed) + 3 * 2**20 < total(sealed) * 1.4


def test_a_push_that_died_is_continued_by_the_next(
    sshd: PrivateSshd, add_node: AddNode, sealed: SealedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "ATTEMPTS", 1)
    with Relay(sshd.port, cut_after=total(sealed) // 2) as relay:
        settings = through(add_node, relay, sshd)
        with connect(settings, "box") as node, pytest.raises(NodeUnreachable) as lost:
            push(node, sealed, ignore)
        assert "it continues" in lost.value.hint
        with connect(settings, "box") as node:
            result = push(node, sealed, ignore)
    assert result.new and 0 < result.skipped_bytes and result.sent_bytes + result.skipped_bytes == total(sealed)


def test_a_black_hole_ends_at_the_deadline(
    sshd: PrivateSshd, add_node: AddNode, sealed: SealedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "STALL_S", 1.0)
    monkeypatch.setattr(push_module, "STALL_S", 1.0)
    with Relay(sshd.port, stall_after=total(sealed) // 2) as relay:
        with connect(through(add_node, relay, sshd), "box") as node:
            begin = time.monotonic()
            assert push(node, sealed, ignore).new
            assert 1 < time.monotonic() - begin < 20
        assert relay.connections == 2


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.7, 0.85, 0.95, 1.0])
def test_a_black_hole_while_connecting_ends_at_the_deadline(
    sshd: PrivateSshd, add_node: AddNode, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(ssh, "CONNECT_S", 1.0)
    monkeypatch.setattr(remote, "HANDSHAKE_S", 2.0)
    with Relay(sshd.port) as relay:
        node = connect(through(add_node, relay, sshd), "box")
        needed = relay.passed
        node.close()
    with Relay(sshd.port, stall_after=int(needed * share)) as relay:
        settings = through(add_node, relay, sshd)
        begin = time.monotonic()
        with pytest.raises(NodeUnreachable):
            connect(settings, "box")
        assert time.monotonic() - begin < 12


def test_an_unknown_key_is_refused_with_its_fingerprint_and_the_way_out(sshd: PrivateSshd, add_node: AddNode) -> None:
    settings = add_node(known=False)
    key = fetch_host_key(settings, "box")
    shown = subprocess.run(["ssh-keygen", "-lf", str(sshd.host_key)], capture_output=True, text=True, check=True).stdout
    with pytest.raises(HostKeyRefused) as refused:
        connect(settings, "box")
    assert key.fingerprint in shown and key.fingerprint in str(refused.value)
    assert "hafs nodes trust box" in refused.value.hint
    trust(settings, "box", key)
    connect(settings, "box").close()


def test_a_changed_key_is_refused_with_both_fingerprints(sshd: PrivateSshd, add_node: AddNode) -> None:
    settings = add_node()
    old = fetch_host_key(settings, "box")
    sshd.new_host_key()
    with pytest.raises(HostKeyRefused) as refused:
        connect(settings, "box")
    with pytest.raises(HostKeyRefused):
        fetch_host_key(settings, "box")
    kind, base64 = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
    new = HostKey(old.host, kind, base64)
    with pytest.raises(HostKeyRefused):
        trust(settings, "box", new)
    assert old.fingerprint in str(refused.value) and new.fingerprint in str(refused.value)


@pytest.mark.parametrize(
    ("command", "said"), [("/nowhere/hafs-node", "status 127"), ("/bin/true", "status 0"), ("/bin/cat", "status 1")]
)
def test_a_command_that_is_no_hafs_node_is_told(add_node: AddNode, command: str, said: str) -> None:
    settings = add_node(command=command, root="")
    with pytest.raises(ProtocolError, match=said) as raised:
        connect(settings, "box")
    assert raised.value.hint


def test_the_words_of_a_missing_command_are_passed_on(add_node: AddNode) -> None:
    with pytest.raises(ProtocolError, match=r"/nowhere/hafs-node.*No such file") as raised:
        connect(add_node(command="/nowhere/hafs-node"), "box")
    assert "[nodes.box]" in raised.value.hint


def test_a_key_the_node_does_not_know_is_told(add_node: AddNode, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    with pytest.raises(NodeUnreachable, match="refuses the login.*stranger") as raised:
        connect(add_node(identity=str(tmp_path / "stranger")), "box")
    assert "identity of [nodes.box]" in raised.value.hint


def test_a_file_that_is_no_key_is_told(add_node: AddNode, tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("nonsense")
    with pytest.raises(NodeUnreachable):
        connect(add_node(identity=str(tmp_path / "nonsense")), "box")


def test_a_port_where_nothing_listens_is_told(add_node: AddNode) -> None:
    with pytest.raises(NodeUnreachable, match="nothing listens there"):
        connect(add_node(port=free_port(), known=False), "box")


def test_something_that_is_no_ssh_server_is_told(add_node: AddNode) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = add_node(port=server.getsockname()[1], known=False)

        def babble() -> None:
            near, _ = server.accept()
            near.sendall(b"220 mail ready\r\n" * 200)
            near.close()

        thread = threading.Thread(target=babble)
        thread.start()
        with pytest.raises(NodeUnreachable):
            connect(settings, "box")
        thread.join()


def test_a_jump_host_is_gone_through_and_has_a_key_of_its_own(
    sshd: PrivateSshd, add_node: AddNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrivateSshd(tmp_path / "gate") as gate:
        config = f"Host gate\n HostName 127.0.0.1\n Port {gate.port}\n IdentityFile {gate.identity}\n"
        config += "Host inner\n HostName 127.0.0.1\n ProxyJump gate\n"
        monkeypatch.setenv("PATH", write_ssh(tmp_path, config))
        settings = add_node(known=False, host="inner")
        first = fetch_host_key(settings, "box")
        assert first.host == f"[127.0.0.1]:{gate.port}"
        trust(settings, "box", first)
        with pytest.raises(HostKeyRefused, match=rf"\[127.0.0.1\]:{sshd.port}"):
            connect(settings, "box")
        trust(settings, "box", fetch_host_key(settings, "box"))
        with connect(settings, "box") as node:
            assert node.open().root == str(tmp_path / "node")


def test_a_key_is_only_trusted_for_a_host_on_the_way(add_node: AddNode) -> None:
    settings = add_node(known=False)
    key = fetch_host_key(settings, "box")
    with pytest.raises(ConfigError, match="not on the way to box"):
        trust(settings, "box", HostKey("elsewhere", key.type, key.base64))


def test_a_file_that_is_refused_is_a_transfer_error(add_node: AddNode, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"data")
    with connect(add_node(), "box") as node:
        with pytest.raises(TransferError, match="box refuses /nowhere/x"), (tmp_path / "y").open("wb") as target:
            node.download("/nowhere/x", target, 0, lambda count: None)
        with (tmp_path / "z").open("wb") as target:  # the same connection still serves
            node.download(str(tmp_path / "x"), target, 0, lambda count: None)
    assert (tmp_path / "z").read_bytes() == b"data"


@pytest.mark.parametrize("offset", [0, 1, 17 * 2**20, 40 * 2**20])
def test_a_download_is_exact_from_any_offset(add_node: AddNode, tmp_path: Path, offset: int) -> None:
    data = random.Random(0).randbytes(40 * 2**20 + 12_345)
    (tmp_path / "model.gguf").write_bytes(data)
    counted: list[int] = []
    with connect(add_node(), "box") as node, (tmp_path / "copy").open("wb") as target:
        node.download(str(tmp_path / "model.gguf"), target, offset, counted.append)
    assert (tmp_path / "copy").read_bytes() == data[offset:] and sum(counted) == len(data) - offset


def test_a_download_cut_in_the_middle_is_a_lost_connection(sshd: PrivateSshd, add_node: AddNode, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(random.Random(0).randbytes(30 * 2**20))
    with Relay(sshd.port, cut_back_after=10 * 2**20) as relay:
        with connect(through(add_node, relay, sshd), "box") as node, (tmp_path / "copy").open("wb") as target:
            with pytest.raises(NodeUnreachable):
                node.download(str(tmp_path / "model.gguf"), target, 0, lambda count: None)
            node.download(str(tmp_path / "model.gguf"), target, target.tell(), lambda count: None)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "model.gguf").read_bytes()


class Echo(BaseHTTPRequestHandler):
    """Answers a POST with its body."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
        server.shutdown()
        thread.join()


@pytest.fixture
def echo() -> Iterator[str]:
    with serving(Echo) as url:
        yield url


def post(url: str, body: bytes) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as reply:
        return bytes(reply.read())


def test_a_server_of_the_node_is_reached_through_the_tunnel(add_node: AddNode, echo: str, sshd: PrivateSshd) -> None:
    with connect(add_node(), "box") as node:
        before = sshd.logins()
        with tunnel(node, echo, lambda: echo) as url:
            assert url != echo and url.startswith("http://127.0.0.1:") and url.endswith("/api")
            bodies = [random.Random(seed).randbytes(100_000) for seed in range(12)] * 50
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(lambda body: post(url, body), bodies)) == bodies
            assert node.call(STATUS, JobArgs()).jobs == []  # lines go on beside it
        with pytest.raises(OSError):
            post(url, b"x")
    assert sshd.logins() == before, "all over one connection"


class Rude(BaseHTTPRequestHandler):
    """Ends the connection while the body is on its way; after a GET it says something."""

    def do_POST(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def do_GET(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nhere")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_a_server_that_breaks_off_ends_no_connection_but_its_own(add_node: AddNode, sshd: PrivateSshd) -> None:
    def broken(number: int) -> bytes:
        with pytest.raises(OSError):
            post(url, bytes(3_000_000 + number))
        with urllib.request.urlopen(url, timeout=30) as reply:
            return bytes(reply.read())

    with serving(Rude) as rude, connect(add_node(), "box") as node, tunnel(node, rude, lambda: rude) as url:
        before = sshd.logins()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(broken, range(100))) == [b"here"] * 100
        assert node.call(STATUS, JobArgs()).jobs == []
        assert sshd.logins() == before


def test_a_tunnel_to_where_nothing_listens_closes_its_connections(add_node: AddNode) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with connect(add_node(), "box") as node, tunnel(node, nowhere, lambda: nowhere) as url:
        with pytest.raises(OSError):
            urllib.request.urlopen(url, timeout=30)


def test_a_server_of_this_machine_needs_no_tunnel(home: Path) -> None:
    server = "http://127.0.0.1:11434/api?x=1"
    with connect(Settings(home=home), LOCAL) as node, tunnel(node, server, lambda: server) as url:
        assert url == server
