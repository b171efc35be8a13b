"""Nodes are forgotten whatever became of the way to them, and one that fails stops nobody else."""

import pytest

from campaigns import nodes
from campaigns.nodes_file import add_node
from campaigns.sync.hostkeys import HostKey, known_keys, pin
from campaigns.sync.ssh_config import Hop, route
from campaigns.sync.survey import Seen, remember
from config.errors import ConfigError
from config.settings import NodeSettings, Settings, load_settings
from tests.unit.campaigns.test_sync_ssh import BLOB


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr("campaigns.sync.ssh_config.shutil.which", lambda name: None)  # a machine without ssh: names are hosts
    settings = load_settings()
    settings.home.mkdir(parents=True)
    for name, host in (("box", "10.0.0.7"), ("same", "10.0.0.7"), ("other", "10.0.0.8")):
        add_node(settings, name, NodeSettings(host=host))
    for host in ("10.0.0.7", "10.0.0.8"):
        pin(settings.known_hosts, HostKey(host, "ssh-ed25519", BLOB))
    return settings


def test_a_host_key_stays_as_long_as_a_node_is_on_that_host(settings: Settings) -> None:
    nodes.remove(settings, "box")
    assert set(known_keys(settings.known_hosts)) == {"10.0.0.7", "10.0.0.8"}
    nodes.remove(settings, "same")
    assert set(known_keys(settings.known_hosts)) == {"10.0.0.8"} and set(settings.nodes()) == {"other"}


def test_what_a_node_said_last_is_forgotten_with_it(settings: Settings) -> None:
    for name in ("box", "other"):
        remember(settings, name, Seen(at=1.0))
    nodes.remove(settings, "box")
    assert [path.name for path in settings.seen.iterdir()] == ["other.json"]


def no_way_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def known_to_ssh(node: NodeSettings) -> list[Hop]:
        if node.host == host:
            raise ConfigError(f"{host} is reached by a ProxyCommand")
        return route(node)

    monkeypatch.setattr(nodes, "route", known_to_ssh)


def test_a_node_that_ssh_knows_no_way_to_can_be_removed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    no_way_to("10.0.0.8", monkeypatch)
    nodes.remove(settings, "other")
    assert set(settings.nodes()) == {"box", "same"}
    assert set(known_keys(settings.known_hosts)) == {"10.0.0.7", "10.0.0.8"}, "nobody can tell whose it was"


def test_a_node_that_ssh_knows_no_way_to_stops_the_removal_of_no_other(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_way_to("10.0.0.8", monkeypatch)
    for name in ("box", "same"):
        nodes.remove(settings, name)
    assert set(settings.nodes()) == {"other"} and set(known_keys(settings.known_hosts)) == {"10.0.0.8"}
