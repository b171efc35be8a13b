"""A node's model server reached through SSH alone: lanes of a campaign, chat, and what becomes of them when the way breaks."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.serving import model_server
from campaigns.sync import remote, tunnel
from config.errors import NodeUnreachable
from config.settings import Settings
from tests.bench.mock import Mock
from tests.fakes.relay import Relay
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd
from tests.fakes.waiting import wait_for
from tests.integration.test_loop import finished, hafs

pytestmark = [pytest.mark.integration, pytest.mark.needs("sshd"), pytest.mark.needs("ssh")]

TARGET = 160
CAMPAIGN = f"""
name = "far"
target = {TARGET}
domains = {{ asm = 1.0 }}

[lanes.far]
provider = "ollama"
node = "box"
model = "teacher"
slots = 8

[lanes.far.gpu]
low = 97
high = 99
"""


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSshd]:
    with PrivateSshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def ollama() -> Iterator[Mock]:
    with Mock(LAT=0.04, FACT=1, MODELS="teacher:latest,hafs-coder:latest") as mock:
        yield mock


@pytest.fixture
def relay(sshd: PrivateSshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with Relay(sshd.port) as relay:
        yield relay


@pytest.fixture
def settings(sshd: PrivateSshd, relay: Relay, ollama: Mock, home: Path, tmp_path: Path) -> Settings:
    """The node `box` behind the relay; its Ollama is the mock."""
    settings = Settings(home=home)
    add_node(settings, sshd, tmp_path / "node", port=relay.port, OLLAMA_HOST=ollama.url)
    return settings


def tags(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/api/tags", timeout=30) as reply:
        return [model["name"] for model in json.load(reply)["models"]]


def answers(url: str) -> bool:
    try:
        return bool(tags(url))
    except (urllib.error.URLError, OSError):
        return False


def test_a_campaign_on_a_node_loses_no_sample_to_lost_connections(
    settings: Settings, relay: Relay, ollama: Mock, tmp_path: Path
) -> None:
    (tmp_path / "far.toml").write_text(CAMPAIGN)
    samples = settings.training / "far" / "samples.jsonl"
    child = hafs("campaign", "start", str(tmp_path / "far.toml"))
    for cut in range(1, 5):
        wait_for("samples", lambda cut=cut: samples.exists() and samples.read_bytes().count(b"\n") >= cut * 30)
        relay.cut()
    finished(child)
    ids = [json.loads(line)["id"] for line in samples.read_bytes().splitlines()]
    assert len(ids) == len(set(ids)) == TARGET
    assert relay.connections == 5, "lane and telemetry share one connection, made again after each cut"
    assert ollama.get("/stats")["ok"] >= TARGET


def test_a_campaign_whose_node_is_off_begins_with_its_other_lane(
    settings: Settings, relay: Relay, ollama: Mock, tmp_path: Path, sshd: PrivateSshd
) -> None:
    settings.nodes_file.write_text(settings.nodes_file.read_text().replace(f"port = {relay.port}", "port = 1"))
    near = f'\n[lanes.near]\nprovider = "ollama"\nhost = "{ollama.url}"\nmodel = "teacher"\nslots = 8\n'
    (tmp_path / "far.toml").write_text(CAMPAIGN.replace(str(TARGET), "60"))
    alone = finished(hafs("campaign", "start", str(tmp_path / "far.toml")), NodeUnreachable.exit_code)
    assert "nothing listens there" in alone
    (tmp_path / "far.toml").write_text(CAMPAIGN.replace(str(TARGET), "60").replace('"far"', '"both"') + near)
    finished(hafs("campaign", "start", str(tmp_path / "far.toml")))


def test_chat_goes_through_the_tunnel(settings: Settings, relay: Relay) -> None:
    assert "Fact" not in finished(hafs("chat", "hafs-coder", "--node", "box", "--prompt", "Fact: it loads A.")).replace("\n", "")
    assert relay.connections == 1


def test_a_server_that_moved_is_found_again(settings: Settings, relay: Relay, ollama: Mock, home: Path) -> None:
    command = home / "box-hafs-node"
    with model_server(settings, "box") as server:
        assert "teacher:latest" in tags(server.url)
        ollama.kill()
        with pytest.raises(OSError):
            tags(server.url)
        with Mock(MODELS="other:latest") as moved:
            command.write_text(command.read_text().replace(ollama.url, moved.url))
            relay.cut()  # a node that came back: its processes see the new address
            wait_for("new server", lambda: answers(server.url), 30)
            assert tags(server.url) == ["other:latest"]


def test_a_black_hole_is_noticed_by_the_ping(
    sshd: PrivateSshd, ollama: Mock, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "PING_EVERY_S", 0.3)
    monkeypatch.setattr(remote, "PING_S", 0.7)
    with Relay(sshd.port) as relay:
        settings = Settings(home=home)
        add_node(settings, sshd, tmp_path / "node", port=relay.port, OLLAMA_HOST=ollama.url)
        with model_server(settings, "box") as server:
            assert tags(server.url)
            relay.stall()
            wait_for("answer", lambda: relay.connections == 2 and answers(server.url), 30)


def test_many_at_once_find_the_way_again_together(settings: Settings, relay: Relay) -> None:
    seen: list[list[str]] = []

    def ask(url: str) -> None:
        wait_for("answer", lambda: answers(url), 30)
        seen.append(tags(url))

    with model_server(settings, "box") as server:
        assert tags(server.url)
        relay.cut()
        threads = [threading.Thread(target=ask, args=(server.url,)) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 32 and relay.connections == 2
