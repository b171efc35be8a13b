"""nodes.toml is a person's file: commands change what they are asked to and nothing else."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from campaigns.nodes_file import add_node, change_node, described_node, remove_node, take_back
from config.errors import ConfigError
from config.settings import NodeSettings, Settings, load_settings

WRITTEN = """# my machines

[nodes.box]           # under the desk
host    = "box"       # ~/.ssh/config knows it
command = "hafs-node"

# the old one
[nodes.old]
host = "10.0.0.9"
"""


@pytest.fixture
def settings() -> Settings:
    settings = load_settings()
    settings.home.mkdir(parents=True)
    return settings


def test_the_first_node_makes_the_file(settings: Settings) -> None:
    add_node(settings, "gpu-box", NodeSettings(host="10.0.0.7", user="me", port=2200, jump="me@gate:22"))
    assert settings.node("gpu-box") == NodeSettings(host="10.0.0.7", user="me", port=2200, jump="me@gate:22")
    text = settings.nodes_file.read_text()
    assert text.startswith("[nodes.gpu-box]\n") and "identity" not in text, "defaults are not written down"


def test_all_that_was_written_stays_as_it_was(settings: Settings) -> None:
    settings.nodes_file.write_text(WRITTEN)
    add_node(settings, "new", NodeSettings(host="10.0.0.7"))
    change_node(settings, "box", command="/home/me/env/bin/hafs-node", root=r"D:\hafs")
    text = settings.nodes_file.read_text()
    for line in (
        "# my machines",
        "[nodes.box]           # under the desk",
        'host    = "box"       # ~/.ssh/config knows it',
        "# the old one",
    ):
        assert line in text
    assert settings.node("box") == NodeSettings(host="box", command="/home/me/env/bin/hafs-node", root=r"D:\hafs")
    assert list(settings.nodes()) == ["box", "old", "new"]
    remove_node(settings, "new")
    change_node(settings, "box", command="hafs-node")
    assert settings.nodes_file.read_text().replace('root = "D:\\\\hafs"\n', "").split() == WRITTEN.split()


def test_dotted_and_inline_tables_are_nodes_too(settings: Settings) -> None:
    settings.nodes_file.write_text('nodes.box.host = "box"\n')
    add_node(settings, "new", NodeSettings(host="10.0.0.7"))
    assert set(settings.nodes()) == {"box", "new"}
    settings.nodes_file.write_text('[nodes]\nbox = { host = "box" }\n')
    change_node(settings, "box", command="/x/hafs-node")
    add_node(settings, "new", NodeSettings(host="10.0.0.7"))
    assert settings.node("box").command == "/x/hafs-node" and set(settings.nodes()) == {"box", "new"}
    remove_node(settings, "box")
    assert set(settings.nodes()) == {"new"}


TEXTS = [
    *("", "# nothing\n", "[nodes]\n", WRITTEN, WRITTEN.rstrip("\n"), WRITTEN + "\n\n# the end"),
    *(
        'nodes.box.host = "box"\n',
        '[nodes]\nbox = { host = "box" }\n',
        '[nodes]\nbox.host = "box"',
        '[nodes.box]\nhost = "b"\n[nodes]\n',
    ),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_node_that_is_not_trusted_leaves_no_trace(settings: Settings, text: str) -> None:
    settings.nodes_file.write_text(text)
    before = set(settings.nodes())
    added = add_node(settings, "new", NodeSettings(host="10.0.0.7"))
    take_back(settings, "new", added)
    assert settings.nodes_file.read_text() == text
    added = add_node(settings, "new", NodeSettings(host="10.0.0.7"))
    add_node(settings, "meanwhile", NodeSettings(host="10.0.0.8"))
    take_back(settings, "new", added)
    change_node(settings, "meanwhile", user="me")
    assert set(settings.nodes()) == before | {"meanwhile"}
    remove_node(settings, "meanwhile")
    assert set(settings.nodes()) == before


def test_the_first_node_that_is_not_trusted_leaves_no_file(settings: Settings) -> None:
    take_back(settings, "new", add_node(settings, "new", NodeSettings(host="10.0.0.7")))
    assert not settings.nodes_file.exists()


def test_a_file_that_cannot_be_added_to_is_said(settings: Settings) -> None:
    text = 'nodes = { box = { host = "box" } }\n'
    settings.nodes_file.write_text(text)
    with pytest.raises(ConfigError, match="cannot be changed here") as refused:
        add_node(settings, "new", NodeSettings(host="10.0.0.7"))
    assert "[nodes.NAME]" in refused.value.hint and settings.nodes_file.read_text() == text


def test_line_ends_and_a_byte_order_mark_are_no_matter(settings: Settings) -> None:
    settings.nodes_file.write_bytes(b"\xef\xbb\xbf" + WRITTEN.replace("\n", "\r\n").encode())
    assert list(settings.nodes()) == ["box", "old"]
    change_node(settings, "old", user="me")
    assert settings.nodes_file.read_bytes().startswith(b"# my machines\r\n\r\n[nodes.box]           # under the desk\r\n")
    assert settings.node("old").user == "me"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_file_that_is_kept_elsewhere_stays_there(settings: Settings, tmp_path: Path) -> None:
    kept = tmp_path / "dotfiles" / "nodes.toml"
    kept.parent.mkdir()
    kept.write_text(WRITTEN)
    settings.nodes_file.symlink_to(kept)
    remove_node(settings, "old")
    assert settings.nodes_file.is_symlink() and "nodes.old" not in kept.read_text()


def test_this_machine_is_no_node_of_the_file(settings: Settings) -> None:
    with pytest.raises(ConfigError, match='"local" is this machine'):
        settings.node("local")
    settings.nodes_file.write_text('[nodes.local]\nhost = "10.0.0.7"\n')
    with pytest.raises(ConfigError, match='nodes.toml.*"local" is this machine'):
        settings.nodes()


@pytest.mark.parametrize("name", ["local", "../x", "a b", "x" * 300, "CON", "nul.txt", "a/b", "a\0b", "", "box."])
def test_a_name_that_cannot_be_one(settings: Settings, name: str) -> None:
    with pytest.raises(ConfigError):
        add_node(settings, name, NodeSettings(host="10.0.0.7"))
    assert not settings.nodes_file.exists()


def test_what_is_taken_missing_or_broken_is_said_and_left_alone(settings: Settings) -> None:
    settings.nodes_file.write_text(WRITTEN)
    with pytest.raises(ConfigError, match='has a node "box"'):
        add_node(settings, "box", NodeSettings(host="other"))
    with pytest.raises(ConfigError, match='no node "nobody"'):
        remove_node(settings, "nobody")
    settings.nodes_file.write_text(WRITTEN + "hots = 3\n")
    with pytest.raises(ConfigError, match='unknown key "nodes.old.hots"'):
        add_node(settings, "new", NodeSettings(host="10.0.0.7"))
    assert settings.nodes_file.read_text() == WRITTEN + "hots = 3\n"


@pytest.mark.parametrize(
    ("key", "value"), [("command", "hafs node"), ("root", "D:/my hafs"), ("root", 'a"b'), ("command", "$(x)"), ("port", 70000)]
)
def test_an_option_that_cannot_be_is_named(key: str, value: str | int) -> None:
    with pytest.raises(ConfigError, match=key):
        described_node(**{"host": "box", key: value})


def test_commands_at_once_take_turns(settings: Settings) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add_node(settings, f"n{number}", NodeSettings(host=f"h{number}")), range(24)))
    assert set(settings.nodes()) == {f"n{number}" for number in range(24)}
