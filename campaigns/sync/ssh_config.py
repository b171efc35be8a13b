"""Which machines lie on the way to a node: the user's own SSH configuration, as `ssh -G` reads it, below nodes.toml.

All functions but `route` are pure. `ssh -G` connects to nothing.
"""

import getpass
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from campaigns.sync.hostkeys import SSH_PORT
from config.errors import ConfigError
from config.settings import NodeSettings

MAX_JUMPS = 8
SSH_G_TIMEOUT_S = 20.0  # a `Match exec` of the user's configuration may take a while
DEFAULT_IDENTITIES = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
_JUMP = re.compile(r"^(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^\]]+\]|[^:@\[\]]+)(?::(?P<port>\d+))?/?$")


@dataclass(frozen=True)
class Hop:
    """One machine to log in to. `jumps` is ProxyJump: the machines before it, nearest to us first."""

    host: str
    port: int = SSH_PORT
    user: str = ""
    identities: tuple[str, ...] = DEFAULT_IDENTITIES
    identities_only: bool = False
    jumps: tuple[str, ...] = ()


def route(node: NodeSettings) -> list[Hop]:
    """Every machine on the way to `node`, in the order of logging in; the node is the last.

    Raises:
        ConfigError: no usable host name, a jump loop, or a ProxyCommand.
    """
    target = _resolve(node.host, node.user, node.port)
    if node.identity:
        target = replace(target, identities=(node.identity,))
    if node.jump:
        target = replace(target, jumps=tuple(node.jump.split(",")))
    return _with_jumps(target, 0)


def ssh_argv(host: str, user: str = "", port: int = 0) -> list[str]:
    """The command that prints the configuration of `host`."""
    return ["ssh", "-G", *(["-l", user] if user else []), *(["-p", str(port)] if port else []), "--", host]


def parse_hop(text: str) -> Hop:
    """What `ssh -G` printed. Raises ConfigError for a ProxyCommand, which is not supported."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        values.setdefault(key.lower(), []).append(value)

    def first(key: str, default: str = "") -> str:
        return values.get(key, [default])[0]

    if first("proxycommand", "none") != "none":
        raise ConfigError(
            f"{first('hostname')} is reached by a ProxyCommand", hint="hafs knows ProxyJump: use that in ~/.ssh/config"
        )
    jumps = first("proxyjump", "none")
    return Hop(
        host=first("hostname"),
        port=int(first("port", str(SSH_PORT))),
        user=first("user"),
        identities=tuple(values.get("identityfile", ())),
        identities_only=first("identitiesonly") == "yes",
        jumps=() if jumps == "none" else tuple(jumps.split(",")),
    )


def parse_jump(text: str) -> tuple[str, str, int]:
    """(host, user, port) of `[user@]host[:port]`; port 0 where it says none. Raises ConfigError."""
    found = _JUMP.match(text.strip())
    if not found:
        raise ConfigError(f'ProxyJump "{text}" is not [user@]host[:port]', hint="correct it in ~/.ssh/config")
    return found["host"].strip("[]"), found["user"] or "", int(found["port"] or 0)


def _with_jumps(hop: Hop, depth: int) -> list[Hop]:
    """As ssh does: only the first jump host's own ProxyJump counts, the others are reached through the one before."""
    if depth > MAX_JUMPS:
        raise ConfigError(f"more than {MAX_JUMPS} jump hosts on the way to {hop.host}", hint="look for a loop of ProxyJump")
    if not hop.jumps:
        return [hop]
    first, *others = [_resolve(*parse_jump(jump)) for jump in hop.jumps]
    return [*_with_jumps(first, depth + 1), *(replace(other, jumps=()) for other in others), hop]


def _resolve(host: str, user: str, port: int) -> Hop:
    """Raises ConfigError where ssh refuses the name."""
    if shutil.which("ssh") is None:
        return Hop(host, port or SSH_PORT, user or getpass.getuser())
    try:
        done = subprocess.run(
            ssh_argv(host, user, port), capture_output=True, text=True, timeout=SSH_G_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"`ssh -G {host}` took more than {SSH_G_TIMEOUT_S:g} s", hint="look into ~/.ssh/config") from error
    if done.returncode != 0:
        raise ConfigError(
            f'ssh refuses the host "{host}": {done.stderr.strip()[-300:]}', hint="check nodes.toml and ~/.ssh/config"
        )
    return parse_hop(done.stdout)
