"""The nodes of this laptop: who answers, who may be trusted. One that does not answer is said, and stops nobody else."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from campaigns.nodes_file import add_node, remove_node, take_back
from campaigns.sync.hostkeys import HostKey, host_label, known_keys, unpin
from campaigns.sync.remote import connect, hafs_version, node_named
from campaigns.sync.ssh_config import route
from config.contracts.wire import DOCTOR, PING, STATUS, DoctorArgs, DoctorCheck, JobArgs, Nothing
from config.errors import ConfigError, HafsError, HostKeyRefused, NodeUnreachable, translate_os_errors
from config.settings import LOCAL, NodeSettings, Settings

DOCTOR_S = 240.0  # it loads torch once
AT_ONCE = 16


@dataclass(frozen=True)
class NodeState:
    """What one look at a node showed. `problem` says why it could not be asked; the figures are nothing then."""

    name: str
    where: str
    hafs: str = ""
    platform: str = ""
    daemon: bool = False
    running: int = 0
    waiting: int = 0
    problem: str = ""

    @property
    def other_version(self) -> bool:
        return bool(self.hafs) and self.hafs != hafs_version()


def look_at_all(settings: Settings) -> list[NodeState]:
    """This machine and the nodes of nodes.toml, asked at once. Raises ConfigError where nodes.toml is wrong."""
    names = [LOCAL, *settings.nodes()]
    with ThreadPoolExecutor(min(len(names), AT_ONCE)) as pool:
        return list(pool.map(lambda name: look_at(settings, name), names))


def look_at(settings: Settings, name: str) -> NodeState:
    where = "this machine" if name == LOCAL else _where(settings.node(name))
    try:
        with node_named(settings, name) as node:
            found, pong = node.ask([(STATUS, JobArgs()), (PING, Nothing())])
    except HafsError as error:
        return NodeState(name, where, problem=str(error))
    jobs = [job.state for job in found.jobs]
    running = sum(state.active for state in jobs)
    owed = sum(not state.ended for state in jobs)
    return NodeState(name, where, pong.hafs, pong.platform, pong.daemon, running, owed - running)


def examine(settings: Settings, name: str) -> list[DoctorCheck]:
    """What the node's own doctor says. Raises as `connect`."""
    with connect(settings, name) as node:
        return node.call(DOCTOR, DoctorArgs(time=time.time()), DOCTOR_S).checks


def add(settings: Settings, name: str, node: NodeSettings, approve: Callable[[HostKey], bool]) -> None:
    """Write a node into nodes.toml and pin the keys on the way to it; where that fails, nodes.toml is as it was before.

    Raises:
        ConfigError: the name is taken.
        NodeUnreachable: it does not answer.
        HostKeyRefused: `approve` said no, or another key is pinned.
    """
    added = add_node(settings, name, node)
    try:
        trust_way(settings, name, approve)
    except NodeUnreachable as error:
        take_back(settings, name, added)
        raise NodeUnreachable(str(error), hint="is it on? try `ssh` to it; nodes.toml is as it was before") from error
    except BaseException:
        take_back(settings, name, added)
        raise


def trust_way(settings: Settings, name: str, approve: Callable[[HostKey], bool]) -> list[HostKey]:
    """Pin the key of every host on the way to `name` that has none yet, each once `approve` has said yes.

    Returns:
        What was pinned now; the node's own is the last.

    Raises:
        HostKeyRefused: `approve` said no, or a key has changed.
        NodeUnreachable, ConfigError: as `connect`.
    """
    from campaigns.sync.ssh import fetch_host_key, trust

    pinned = list[HostKey]()
    while (key := fetch_host_key(settings, name)).host not in known_keys(settings.known_hosts):
        if not approve(key):
            raise HostKeyRefused(
                f"{key.host} shows {key.type} {key.fingerprint}, which you did not approve",
                hint="compare it with what `ssh-keygen -lf` prints of the key in /etc/ssh on that machine; nothing was pinned. "
                f"In a script: --yes-fingerprint {key.fingerprint}",
            )
        trust(settings, name, key)
        pinned.append(key)
    return pinned


def approve_listed(fingerprints: Sequence[str]) -> Callable[[HostKey], bool]:
    """For scripts: yes to the keys with these fingerprints, no to all others."""
    return lambda key: key.fingerprint in fingerprints


def remove(settings: Settings, name: str) -> None:
    """Forget a node, what it said last, and its host key unless another node is on that host. The machine is left as it is.

    Where ssh's configuration leads to it no more, nobody can tell its key from those of others, and the key stays.
    """
    label = _label(settings.node(name))
    remove_node(settings, name)
    with translate_os_errors(settings.seen):
        (settings.seen / f"{name}.json").unlink(missing_ok=True)  # another machine may get the name
    if label and label not in {_label(other) for other in settings.nodes().values()}:
        unpin(settings.known_hosts, label)


def _label(node: NodeSettings) -> str:
    """The name of its host key; empty where ssh's configuration knows no way to it."""
    try:
        hop = route(node)[-1]
    except ConfigError:
        return ""
    return host_label(hop.host, hop.port)


def _where(node: NodeSettings) -> str:
    """As a person wrote it in nodes.toml."""
    user = f"{node.user}@" if node.user else ""
    return f"{user}{node.host}" + (f":{node.port}" if node.port else "")
