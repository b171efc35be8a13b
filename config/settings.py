"""Where things are. HAFS_HOME (default ~/.context) holds everything hafs writes."""

import json
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, field_validator

from config.contracts.base import Strict
from config.contracts.manifest import NAME
from config.contracts.names import Portable, is_portable
from config.errors import ConfigError
from config.files import write_atomic
from config.toml import load_toml

LOCAL = "local"  # the node that is this machine


class NodeSettings(Strict):
    """One node of nodes.toml. `host` is a host name or an alias of ~/.ssh/config. `command`: `hafs-node` there, absolute."""

    host: str
    user: str = ""
    port: int = Field(0, ge=0, le=65535, description="0: what ssh's own configuration says, else 22")
    identity: str = ""
    jump: str = Field(
        "", description="as ProxyJump: [user@]host[:port], several with commas; empty: what ssh's configuration says"
    )
    command: str = Field("hafs-node", pattern=r"^[A-Za-z0-9_./:\\~-]+$")
    root: str = Field("", pattern=r"^[A-Za-z0-9_./:\\~-]*$", description="the node's folder; empty: its own HAFS_HOME/node")


class NodesFile(Strict):
    nodes: dict[Annotated[str, Field(pattern=NAME), Portable], NodeSettings] = {}

    @field_validator("nodes")
    @classmethod
    def _local_is_taken(cls, nodes: dict[str, NodeSettings]) -> dict[str, NodeSettings]:
        if LOCAL in nodes:
            raise ValueError(f'"{LOCAL}" is this machine, always: choose another name for the node')
        return nodes


class KeysFile(Strict):
    """Keys of model servers, each under the name of the environment variable that may hold it too."""

    model_config = ConfigDict(hide_input_in_errors=True)

    keys: dict[str, str] = {}


class Settings(Strict):
    home: Path

    @property
    def training(self) -> Path:
        return self.home / "training"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def models(self) -> Path:
        """Pulled results: models/<name>/v<N>/…"""
        return self.home / "models"

    @property
    def segments(self) -> Path:
        """Rows that were packed to be sent."""
        return self.home / "segments"

    @property
    def loops(self) -> Path:
        return self.home / "loops"

    @property
    def jobs(self) -> Path:
        """What this laptop submitted: one file a submit, written before it is sent."""
        return self.home / "jobs"

    @property
    def seen(self) -> Path:
        """What each node said last: one file a node."""
        return self.home / "seen"

    @property
    def feedback_file(self) -> Path:
        """What people thought of answers: rows of config/contracts/feedback.py."""
        return self.home / "feedback.jsonl"

    @property
    def chat_history(self) -> Path:
        """The questions that were typed on a terminal."""
        return self.home / "chat_history"

    @property
    def notify_file(self) -> Path:
        return self.home / "notify.toml"

    @property
    def node_root(self) -> Path:
        """The root of the node `local`."""
        return self.home / "node"

    @property
    def nodes_file(self) -> Path:
        return self.home / "nodes.toml"

    @property
    def keys_file(self) -> Path:
        return self.home / "keys.toml"

    @property
    def known_hosts(self) -> Path:
        return self.home / "known_hosts"

    def nodes(self) -> dict[str, NodeSettings]:
        """The nodes of nodes.toml by name, without `local`."""
        return load_toml(self.nodes_file, NodesFile).nodes if self.nodes_file.exists() else {}

    def node(self, name: str) -> NodeSettings:
        """Raises ConfigError for a name that nodes.toml does not have."""
        nodes = self.nodes()
        if name == LOCAL:
            raise ConfigError(f'"{LOCAL}" is this machine: nodes.toml has nothing on it', hint="nothing has to be set up for it")
        if name not in nodes:
            known = ", ".join([LOCAL, *nodes])
            raise ConfigError(
                f'no node "{name}" in {self.nodes_file}', hint=f"known nodes: {known}; a new one: hafs nodes add {name} HOST"
            )
        return nodes[name]

    def key(self, name: str) -> str:
        """The key of a model server: the environment variable `name`, else what keys.toml has under it; empty for none."""
        if name and os.environ.get(name):
            return os.environ[name]
        return self._keys().get(name, "")

    def keep_key(self, name: str, value: str) -> None:
        """Write a key into keys.toml, which nobody else may read.

        Raises:
            ConfigError: it cannot be a key. The message does not repeat it.
        """
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not re.fullmatch(r"[\x21-\x7e]+", value):
            raise ConfigError(f"what was given as {name} cannot be a key", hint="a key has no spaces and only plain letters")
        keys = {**self._keys(), name: value}
        lines = [f"{key} = {json.dumps(text)}" for key, text in sorted(keys.items())]  # ASCII: JSON's quotes are TOML's
        write_atomic(self.keys_file, "\n".join(["[keys]", *lines, ""]).encode())  # its temporary file is born with mode 0600

    def _keys(self) -> dict[str, str]:
        return load_toml(self.keys_file, KeysFile).keys if self.keys_file.exists() else {}


def load_settings() -> Settings:
    return Settings(home=Path(os.environ.get("HAFS_HOME") or "~/.context").expanduser().resolve())


def plain_address(address: str) -> bool:
    """Whether an address of a server can be shown: none with a user, a password, a query or a fragment, where keys are put."""
    return not re.search(r"[@?#]", address)


def require_name(name: str, what: str) -> str:
    """A name that is safe as a folder and on a wire. Raises ConfigError."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(f'"{name}" cannot name a {what}', hint="use letters, digits, - _ and . only, 80 at most")
    if not is_portable(name):
        raise ConfigError(f'"{name}" cannot name a {what}', hint="Windows keeps such names for itself: choose another")
    return name
