"""What is pure about SSH: command lines, configuration, paths, known_hosts."""

from pathlib import Path

import pytest

from campaigns.sync.hostkeys import HostKey, host_label, known_keys, pin, require_same
from campaigns.sync.ssh import rpc_command, sftp_path
from campaigns.sync.ssh_config import Hop, parse_hop, parse_jump, route, ssh_argv
from config.errors import ConfigError, HostKeyRefused
from config.settings import NodeSettings
from tests.fakes.sshd import write_ssh

FINGERPRINT = "SHA256:W/62h2AA4m9N9XpTTHHMw2hyN3rm0ffMFa2ef3wTa6o"  # what ssh-keygen -lf says of the next line
BLOB = "AAAAC3NzaC1lZDI1NTE5AAAAIIpVnSdyDGCUzsSX/XQFHo4vHxgFDAH1DM2t0xEcc9c5"
OTHER = "AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
SSH_CONFIG = """
Host box
    HostName 127.0.0.9
    Port 2201
    User u
    IdentityFile /k/box
    ProxyJump gate,inner
Host gate
    HostName 127.0.0.7
    User g
    IdentityFile /k/gate
    ProxyJump outer
Host inner
    HostName 127.0.0.8
    User i
    IdentityFile /k/inner
    ProxyJump outer
Host outer
    HostName 127.0.0.6
    User o
    IdentityFile /k/outer
"""


def test_the_remote_command_is_constant() -> None:
    assert rpc_command(NodeSettings(host="box")) == "hafs-node rpc"
    node = NodeSettings(host="box", command="/opt/hafs/bin/hafs-node", root="D:/hafs")
    assert rpc_command(node) == "/opt/hafs/bin/hafs-node rpc --root D:/hafs"


@pytest.mark.parametrize("evil", ["hafs-node; rm", "a b", 'a"b', "$(x)", "a\n", "`x`", "a&b"])
def test_the_grammar_of_the_command_lets_no_shell_word_in(evil: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        NodeSettings(host="box", command=evil)


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/home/u/x.part", "/home/u/x.part"),
        ("D:\\hafs\\x.part", "/D:/hafs/x.part"),
        ("d:/hafs/x.part", "/d:/hafs/x.part"),
        ("/odd\\name", "/odd\\name"),
        ("C:relative", "C:relative"),
    ],
)
def test_paths_for_sftp(path: str, there: str) -> None:
    assert sftp_path(path) == there


def test_ssh_is_asked_with_what_nodes_toml_overrides() -> None:
    assert ssh_argv("box") == ["ssh", "-G", "--", "box"]
    assert ssh_argv("-oProxyCommand=x", "u", 2200) == ["ssh", "-G", "-l", "u", "-p", "2200", "--", "-oProxyCommand=x"]


def test_what_ssh_prints_becomes_a_hop() -> None:
    text = """host box
user trainer
hostname 10.0.0.7
port 2222
identitiesonly yes
identityfile ~/.ssh/box
identityfile ~/.ssh/old
proxyjump gate,me@inner:2200
"""
    assert parse_hop(text) == Hop(
        "10.0.0.7", 2222, "trainer", ("~/.ssh/box", "~/.ssh/old"), identities_only=True, jumps=("gate", "me@inner:2200")
    )
    assert parse_hop("hostname h\nport 22\nuser u\nproxyjump none\nproxycommand none\n") == Hop("h", 22, "u", ())


def test_a_proxy_command_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="ProxyCommand"):
        parse_hop("hostname h\nport 22\nproxycommand nc %h %p\n")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gate", ("gate", "", 0)),
        ("me@gate:2200", ("gate", "me", 2200)),
        ("ssh://me@gate:2200", ("gate", "me", 2200)),
        ("[::1]:22", ("::1", "", 22)),
        ("a@b@gate", None),
        ("gate:x", None),
        ("", None),
    ],
)
def test_jump_hosts(text: str, parts: tuple[str, str, int] | None) -> None:
    if parts is None:
        with pytest.raises(ConfigError):
            parse_jump(text)
    else:
        assert parse_jump(text) == parts


@pytest.mark.needs("ssh")
def test_the_way_follows_the_users_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", write_ssh(tmp_path, SSH_CONFIG))
    hops = route(NodeSettings(host="box", port=2300, identity="/k/mine"))
    assert [(hop.user, hop.host, hop.port, hop.identities) for hop in hops] == [
        ("o", "127.0.0.6", 22, ("/k/outer",)),
        ("g", "127.0.0.7", 22, ("/k/gate",)),
        ("i", "127.0.0.8", 22, ("/k/inner",)),
        ("u", "127.0.0.9", 2300, ("/k/mine",)),
    ]


@pytest.mark.needs("ssh")
def test_a_loop_of_jumps_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", write_ssh(tmp_path, "Host a\n ProxyJump b\nHost b\n ProxyJump a\n"))
    with pytest.raises(ConfigError, match="more than 8 jump hosts"):
        route(NodeSettings(host="a"))


@pytest.mark.needs("ssh")
def test_a_host_that_is_an_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", write_ssh(tmp_path, ""))
    with pytest.raises(ConfigError, match="refuses the host"):
        route(NodeSettings(host="-oProxyCommand=touch x"))


def test_without_an_ssh_client_nodes_toml_alone_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert route(NodeSettings(host="box", user="u", port=2200)) == [Hop("box", 2200, "u")]


def test_labels_are_those_of_known_hosts() -> None:
    assert (host_label("box", 22), host_label("box", 2200)) == ("box", "[box]:2200")


def test_the_fingerprint_is_the_one_ssh_shows() -> None:
    assert HostKey("box", "ssh-ed25519", BLOB).fingerprint == FINGERPRINT


def test_a_pinned_key_stays(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    key, other = HostKey("[box]:2200", "ssh-ed25519", BLOB), HostKey("[box]:2200", "ssh-ed25519", OTHER)
    pin(file, key)
    pin(file, HostKey("second", "ssh-ed25519", OTHER))
    before = file.read_bytes()
    pin(file, key)
    with pytest.raises(HostKeyRefused) as refused:
        pin(file, other)
    assert key.fingerprint in str(refused.value) and other.fingerprint in str(refused.value)
    assert file.read_bytes() == before
    assert known_keys(file) == {"[box]:2200": key, "second": HostKey("second", "ssh-ed25519", OTHER)}
    require_same(file, key, key)


@pytest.mark.parametrize(
    "line",
    [
        *("garbage", "box ssh-ed25519 %%%", "box ssh-rsa " + BLOB, "box ssh-ed25519 " + BLOB[:-4], "box ssh-ed25519 AAAA"),
        *("@revoked box ssh-ed25519 " + BLOB, "@cert-authority *.org ssh-ed25519 " + BLOB, "*.org ssh-ed25519 " + BLOB),
        *("|1|c2FsdA==|aGFzaA== ssh-ed25519 " + BLOB, "box,10.0.0.7 ssh-ed25519 " + BLOB, "!box ssh-ed25519 " + BLOB),
    ],
)
def test_a_line_that_is_no_key_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"# comment\n\nfirst ssh-ed25519 {BLOB}\n{line}\n")
    with pytest.raises(ConfigError, match="known_hosts:4"):
        known_keys(file)


def test_two_keys_for_one_host_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"box ssh-ed25519 {BLOB}\nbox ssh-ed25519 {OTHER}\n")
    with pytest.raises(ConfigError, match="a second key for box"):
        known_keys(file)
