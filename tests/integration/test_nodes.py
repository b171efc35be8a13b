"""`hafs nodes` against a real sshd, and what a node refuses and shows to the network."""

import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from campaigns import nodes
from campaigns.cli.main import main
from campaigns.sync.hostkeys import HostKey
from campaigns.sync.remote import connect
from campaigns.sync.ssh import connect_ssh
from config.contracts.wire import RUNTIME, Reply, RuntimeArgs
from config.errors import HostKeyRefused
from config.locks import holder
from config.settings import Settings
from tests.fakes.evil_requests import evil_lines
from tests.fakes.leftovers import end_nodes
from tests.fakes.ports import free_port
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd, write_ssh
from tests.fakes.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.needs("sshd"), pytest.mark.needs("ssh")]

COMMAND = str(Path(sys.executable).parent / "hafs-node")


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateSshd]:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with PrivateSshd(tmp_path / "sshd") as server:
        yield server
        end_nodes(tmp_path)


Hafs = Callable[..., str]


@pytest.fixture
def hafs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hafs:
    """Runs `hafs nodes …` in this process. Returns what it says."""

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["hafs", "nodes", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = "".join(capsys.readouterr())
        assert ended.value.code == code, said
        return said

    return run


def options(sshd: PrivateSshd, root: Path) -> list[str]:
    named = {"--port": str(sshd.port), "--identity": str(sshd.identity), "--command": COMMAND, "--root": str(root)}
    return [word for pair in named.items() for word in pair]


def key_of(sshd: PrivateSshd, port: int = 0) -> HostKey:
    kind, base64 = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
    return HostKey(f"[127.0.0.1]:{port or sshd.port}", kind, base64)


def test_a_node_is_added_listed_and_removed(
    sshd: PrivateSshd, hafs: Hafs, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = hafs("add", "box", "127.0.0.1", *options(sshd, tmp_path / "n"), "--yes-fingerprint", "SHA256:x", code=32)
    assert key_of(sshd).fingerprint in wrong and "did not approve" in wrong
    assert "box" not in Settings(home=home).nodes() and not (home / "known_hosts").exists()

    words = ["add", "box", "127.0.0.1", *options(sshd, tmp_path / "n")]
    with monkeypatch.context() as nobody:
        nobody.setattr(sys, "stdin", io.StringIO())
        unasked = hafs(*words, code=32)
    assert f"--yes-fingerprint {key_of(sshd).fingerprint}" in unasked and not (home / "known_hosts").exists()
    added = hafs(*words, "--yes-fingerprint", key_of(sshd).fingerprint)
    assert "nodes setup box" in added
    assert 'has a node "box"' in hafs(*words, "--yes-fingerprint", key_of(sshd).fingerprint, code=3)

    with (home / "nodes.toml").open("a") as file:
        file.write(f'\n[nodes.gone]\nhost = "127.0.0.1"\nport = {free_port()}\n')
    listed = {node["name"]: node for node in json.loads(hafs("list", "--json"))}
    assert set(listed) == {"local", "box", "gone"}
    assert listed["box"]["hafs"] and not listed["box"]["problem"] and not listed["local"]["problem"]
    assert "nothing listens there" in listed["gone"]["problem"]
    shown = hafs("list")
    assert re.search(r"gone +127\.0\.0\.1:\d+ +does not answer", shown) and "gone cannot be reached" in shown

    hafs("remove", "box")
    assert set(Settings(home=home).nodes()) == {"gone"} and (home / "known_hosts").read_text() == ""


def test_a_jump_host_of_an_option_has_its_key_approved_too(
    sshd: PrivateSshd, hafs: Hafs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrivateSshd(tmp_path / "gate") as gate:
        monkeypatch.setenv("PATH", write_ssh(tmp_path, f"Host gate\n HostName 127.0.0.1\n IdentityFile {gate.identity}\n"))
        jump = f"{gate.user}@gate:{gate.port}"
        words = ["add", "box", "127.0.0.1", *options(sshd, tmp_path / "n"), "--jump", jump]
        only_one = hafs(*words, "--yes-fingerprint", key_of(gate).fingerprint, code=32)
        assert key_of(sshd).fingerprint in only_one
        both = [word for key in (key_of(gate), key_of(sshd)) for word in ("--yes-fingerprint", key.fingerprint)]
        hafs(*words, *both)
        assert str(tmp_path / "n") in hafs("check", "box")


def test_a_changed_key_has_no_way_past_it(sshd: PrivateSshd, hafs: Hafs, home: Path, tmp_path: Path) -> None:
    settings = Settings(home=home)
    add_node(settings, sshd, tmp_path / "node")
    before = settings.known_hosts.read_bytes()
    sshd.new_host_key()
    for words in (["check", "box"], ["trust", "box", "--yes"], ["trust", "box", "--yes-fingerprint", key_of(sshd).fingerprint]):
        assert "has changed" in hafs(*words, code=32)
    with pytest.raises(HostKeyRefused):
        nodes.trust_way(settings, "box", lambda key: True)
    assert settings.known_hosts.read_bytes() == before and not (tmp_path / "node").exists()
    hafs("remove", "box")  # to forget a machine that was installed anew, and to look at it as at a new one
    assert settings.known_hosts.read_text() == ""


def test_a_second_key_of_the_host_is_no_change_of_the_first(sshd: PrivateSshd, hafs: Hafs, home: Path, tmp_path: Path) -> None:
    settings, second = Settings(home=home), sshd.folder / "second"
    add_node(settings, sshd, tmp_path / "node")
    settings.known_hosts.unlink()
    sshd.host_key.rename(second)
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(sshd.host_key)], check=True)
    sshd.stop()
    sshd.start()
    assert "ecdsa" in hafs("trust", "box", "--yes")
    sshd.stop()
    sshd.more = f"HostKey {second}\n"  # the type that is asked for first, where nothing is pinned
    sshd.start()
    assert "pinned already" in hafs("trust", "box", "--yes")
    hafs("check", "box")


def test_two_hundred_evil_requests_over_ssh(sshd: PrivateSshd, home: Path, tmp_path: Path) -> None:
    settings, root = Settings(home=home), tmp_path / "outer" / "node"
    add_node(settings, sshd, root)
    transport = connect_ssh(settings, "box")
    try:
        for line, must in islice(((line, must) for line, must in evil_lines(7, 10_000) if b"\n" not in line), 200):
            reply = Reply.model_validate_json(transport.exchange(line + b"\n", 20))
            assert reply.error is not None or not must, line[:300]
            assert reply.error is None or reply.error.code != "NodeError", (reply.error, line[:300])
        assert Reply.model_validate_json(transport.exchange(b'{"verb": "ping"}\n', 20)).result
    finally:
        transport.close()
    assert "127.0.0.1 ProtocolError" in (root / "rpc.log").read_text()
    written = {path.relative_to(root.parent).as_posix() for path in root.parent.rglob("*") if path.is_file()}
    assert {name for name in written if not name.endswith(".lock")} <= {
        *("node/rpc.log", "node/state.sqlite", "node/state.sqlite-wal", "node/state.sqlite-shm")
    }


@pytest.mark.needs("ss")
def test_nothing_of_ours_listens_but_the_runtime_on_loopback(sshd: PrivateSshd, home: Path, tmp_path: Path) -> None:
    settings, root = Settings(home=home), tmp_path / "node"
    add_node(settings, sshd, root, HAFS_RUNTIME="embedded")
    daemon = subprocess.Popen([COMMAND, "daemon", "--root", str(root), "--idle-exit", "60"])
    try:
        wait_for("daemon", lambda: holder(root / "daemon.lock"))
        with connect(settings, "box") as node:
            runtime = node.call(RUNTIME, RuntimeArgs())
            assert listening(root) == [runtime.url.removeprefix("http://")] and runtime.url.startswith("http://127.0.0.1:")
        for header, value in (("Host", "evil.example"), ("Origin", "http://evil.example"), ("Host", "10.0.0.1:80")):
            for path in ("/api/tags", "/", "/api/version"):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(urllib.request.Request(runtime.url + path, headers={header: value}), timeout=10)
                assert refused.value.code == 403
                refused.value.close()
    finally:
        daemon.terminate()
        daemon.wait(20)


def listening(root: Path) -> list[str]:
    """The local addresses at which a process of this node listens, as ss sees them: daemon, runtime, runners, rpc."""
    shown = subprocess.run(["ss", "-Hlntp"], capture_output=True, text=True, check=True).stdout
    found = []
    for line in shown.splitlines():
        for pid in re.findall(r"pid=(\d+)", line):
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and str(root).encode() in command.read_bytes():
                found.append(line.split()[3])
    return found
