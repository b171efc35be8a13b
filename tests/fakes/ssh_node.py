"""A node of nodes.toml behind a private sshd, with a trusted key; its `hafs-node` may see an environment of its own."""

import shlex
import sys
from pathlib import Path

from campaigns.sync.hostkeys import HostKey
from campaigns.sync.ssh import trust
from config.settings import Settings
from tests.fakes.sshd import PrivateSshd

NODE_COMMAND = Path(sys.executable).parent / "hafs-node"


def add_node(settings: Settings, sshd: PrivateSshd, root: Path, *, name: str = "box", port: int = 0, **environment: str) -> None:
    """Append a node to nodes.toml. `port` 0 is the sshd's own, else that of a relay before it."""
    settings.home.mkdir(parents=True, exist_ok=True)
    command = settings.home / f"{name}-hafs-node"  # sshd hands on nothing of the test's environment
    words = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    command.write_text(f'#!/bin/sh\nexec env {" ".join(words)} {shlex.quote(str(NODE_COMMAND))} "$@"\n')
    command.chmod(0o755)
    values = {
        "host": sshd.address,
        "user": sshd.user,
        "identity": str(sshd.identity),
        "root": str(root),
        "command": str(command),
    }
    lines = [f"[nodes.{name}]", f"port = {port or sshd.port}", *(f'{key} = "{value}"' for key, value in values.items())]
    with settings.nodes_file.open("a") as file:
        file.write("\n".join([*lines, ""]))
    kind, base64 = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
    trust(settings, name, HostKey(f"[{sshd.address}]:{port or sshd.port}", kind, base64))
