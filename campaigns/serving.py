"""Reach the model server of a node from the laptop: its Ollama, or the embedded runtime, started if need be."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from campaigns.sync.remote import Node, connect
from campaigns.sync.tunnel import tunnel
from config.contracts.wire import RUNTIME, SERVER, Nothing, RuntimeArgs, RuntimeResult
from config.errors import NodeUnreachable, ProviderUnavailable
from config.settings import Settings

log = logging.getLogger("hafs.campaign")

SERVER_S = 900.0  # a server may have to be started, and a GGUF of many GB hashed and copied there
FIND_S = 75.0  # the same server again, or started once more


@dataclass(frozen=True)
class Server:
    """`url` is as this machine reaches it; `model` is the name that a GGUF was registered under, where one was given.

    `embedded`: it is hafs's own runtime; `started`: just now.
    """

    url: str
    model: str
    started: bool
    embedded: bool


@contextmanager
def model_server(settings: Settings, node_name: str, *, model: str = "", gguf: str = "") -> Iterator[Server]:
    """The server of a node for as long as the block lasts. Raises NodeError, ProviderUnavailable, ConfigError."""
    with connect(settings, node_name) as node, server_of(node, model=model, gguf=gguf) as server:
        yield server


@contextmanager
def server_of(
    node: Node, *, model: str = "", gguf: str = "", patient: bool = False, before: Server | None = None
) -> Iterator[Server]:
    """The same over a connection that others may share. A lost one is made again; a server that has ended is started again.

    Args:
        patient: a node that does not answer now is no error; requests to its server fail until it does.
        before: the server as it was found earlier: an Ollama that is away for a moment is not replaced.
    """
    wanted = RuntimeArgs.typed(model, gguf)
    try:
        found = _found(node, wanted, before)
    except NodeUnreachable as error:
        if not patient:
            raise
        log.warning("%s; its model server is used once it answers", error)
        found = RuntimeResult(url="", embedded=False, version="", started=False)
    with tunnel(node, found.url, lambda: _again(node, wanted, found)) as url:
        yield Server(url, found.model, found.started, found.embedded)


def _found(node: Node, args: RuntimeArgs, before: Server | None) -> RuntimeResult:
    if before is None or before.embedded:
        return node.call(RUNTIME, args, SERVER_S)
    return RuntimeResult(url=_again(node, args, before), embedded=False, version="", started=False)


def _again(node: Node, args: RuntimeArgs, before: RuntimeResult | Server) -> str:
    """Where a server is that was there before. An Ollama that is away for a moment is not replaced: its models are its own."""
    if before.embedded or not before.url:
        return node.call(RUNTIME, args, FIND_S).url
    now = node.call(SERVER, Nothing(), FIND_S)
    if not now.url or now.embedded:
        raise ProviderUnavailable(f"{node.name}: no Ollama answers there", billable=False, hint="is its service running?")
    return now.url
