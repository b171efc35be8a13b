"""`hafs serve`: a model behind an OpenAI-compatible API, on a port of this machine.

Who is on this machine may ask without a key. To listen on any other address takes one: HAFS_API_KEY in the environment or in
keys.toml, or --api-key.
"""

import importlib.util
import ipaddress
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from campaigns.chat import look_for
from campaigns.serving import server_of
from campaigns.sync.remote import connect
from config.errors import ConfigError, MissingExtra
from config.settings import Settings

KEY_NAME = "HAFS_API_KEY"
BACKLOG = 128
DRAIN_S = 5  # answers under way, once it is to end


@dataclass(frozen=True)
class ServeOptions:
    """`api_key`: empty for none. `num_ctx` is the context window in tokens that every answer gets."""

    host: str
    port: int
    api_key: str
    num_ctx: int


def serve(settings: Settings, node: str, model: str, options: ServeOptions, on_ready: Callable[[str, str], None]) -> None:
    """Answer until Ctrl-C or SIGTERM; `on_ready` is told the URL and the model's full name.

    Raises:
        MissingExtra: the packages of the extra `serve` are not installed.
        ConfigError: the port cannot be had, or an address that others reach has no key.
        ModelMissing: there is no such model at the node's server.
        NodeError, ProviderError: node or server are not there.
    """
    require_extra()
    require_key(options)
    import anyio
    import uvicorn

    from campaigns.serve_api import build
    from campaigns.serve_gateway import Gateway

    with _bound(options.host, options.port) as listening, connect(settings, node) as remote:
        with server_of(remote) as server:
            model = look_for(server.url, model)
        host, port = listening.getsockname()[:2]
        gateway = Gateway(remote, model, server)
        app = build(gateway, options.api_key, options.num_ctx, host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        on_ready(url, model)  # connections wait in the queue until the server takes them
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DRAIN_S)

        async def answer() -> None:
            await gateway.reach()
            await uvicorn.Server(config).serve(sockets=[listening])

        anyio.run(answer)


def require_extra() -> None:
    """Raises MissingExtra, with what to install."""
    for package in ("fastapi", "uvicorn", "fastapi_offline"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"the package {package} is not installed", hint='pip install "hafs[serve]"')


def require_key(options: ServeOptions) -> None:
    """Raises ConfigError for an address that others reach without a key, and for a key that no client can send."""
    key = options.api_key
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("what was given as the API key cannot be one", hint="a key has no spaces and only plain letters")
    if not key and not on_this_machine(options.host):
        raise ConfigError(
            f"others can reach {options.host}, so an API key has to be set",
            hint=f"set {KEY_NAME} in the environment or in keys.toml, or leave out --host",
        )


def on_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # the latter for what no name can be
        what = error.strerror if isinstance(error, OSError) else "no host has such a name"
        raise ConfigError(f"--host {host}: {what}", hint="give an address of this machine") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}", hint="choose another --port") from error
    return listening
