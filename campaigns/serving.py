"""Reach the model server of a node from the laptop: its Ollama, or the embedded runtime, started if need be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from campaigns.sync.remote import connect
from config.contracts.wire import RUNTIME, RuntimeArgs
from config.settings import Settings

SERVER_S = 900.0  # a server may have to be started, and a GGUF of many GB hashed and copied there


@dataclass(frozen=True)
class Server:
    """`url` is as this machine reaches it; `model` is the name that a GGUF was registered under, where one was given."""

    url: str
    model: str
    started: bool


@contextmanager
def model_server(settings: Settings, node_name: str, *, model: str = "", gguf: str = "") -> Iterator[Server]:
    """The server of a node for as long as the block lasts. Raises NodeError, ProviderUnavailable, ConfigError."""
    with connect(settings, node_name) as node:
        found = node.call(RUNTIME, RuntimeArgs(model=model, gguf=gguf), deadline_s=SERVER_S)
        with node.tunnel(found.url) as url:
            yield Server(url, found.model, found.started)
