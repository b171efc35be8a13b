"""Where things are. HAFS_HOME (default ~/.context) holds everything hafs writes."""

import os
import re
from pathlib import Path

from pydantic import Field

from config.contracts.base import Strict
from config.contracts.manifest import NAME
from config.errors import ConfigError
from config.toml import load_toml

LOCAL = "local"  # the node that is this machine


class NodeSettings(Strict):
    """One node of nodes.toml. `host` is a host name or an alias of ~/.ssh/config. `command`: `hafs-node` there, absolute."""

    host: str
    user: str = ""
    port: int = Field(0, ge=0, le=65535, description="0: what ssh's own configuration says, else 22")
    identity: str = ""
    command: str = Field("hafs-node", pattern=r"^[A-Za-z0-9_./:\\~-]+$")
    root: str = Field("", pattern=r"^[A-Za-z0-9_./:\\~-]*$", description="the node's folder; empty: its own HAFS_HOME/node")


class NodesFile(Strict):
    nodes: dict[str, NodeSettings] = {}


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
    def loops(self) -> Path:
        return self.home / "loops"

    @property
    def jobs(self) -> Path:
        """What this laptop submitted: one file a submit, written before it is sent."""
        return self.home / "jobs"

    @property
    def node_root(self) -> Path:
        """The root of the node `local`."""
        return self.home / "node"

    @property
    def nodes_file(self) -> Path:
        return self.home / "nodes.toml"

    @property
    def known_hosts(self) -> Path:
        return self.home / "known_hosts"

    def nodes(self) -> dict[str, NodeSettings]:
        """The nodes of nodes.toml by name, without `local`."""
        return load_toml(self.nodes_file, NodesFile).nodes if self.nodes_file.exists() else {}

    def node(self, name: str) -> NodeSettings:
        """Raises ConfigError for a name that nodes.toml does not have."""
        nodes = self.nodes()
        if name not in nodes:
            known = ", ".join([LOCAL, *nodes])
            raise ConfigError(f'no node "{name}" in {self.nodes_file}', hint=f"known nodes: {known}; add a table [nodes.{name}]")
        return nodes[name]


def load_settings() -> Settings:
    return Settings(home=Path(os.environ.get("HAFS_HOME") or "~/.context").expanduser().resolve())


def require_name(name: str, what: str) -> str:
    """A name that is safe as a folder and on a wire. Raises ConfigError."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(f'"{name}" cannot name a {what}', hint="use letters, digits, - _ and . only, 80 at most")
    return name
