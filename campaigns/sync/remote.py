"""A node by name: typed calls over whichever transport reaches it.

A call is asked at most twice, the second time over a new connection; all verbs are idempotent, so a lost answer is harmless.
Every connection begins with the version handshake.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import tenacity
from pydantic import ValidationError

from campaigns.sync.local import LocalTransport, rpc_argv
from campaigns.sync.transport import OnBytes, Transport
from config.contracts.base import Tolerant, canonical_json
from config.contracts.job import JobError
from config.contracts.wire import MAX_LINE_BYTES, PING, PROTOCOL_VERSION, Nothing, Pong, Reply, Request, Verb
from config.errors import HafsError, NodeUnreachable, ProtocolError, TransferError, error_named
from config.settings import LOCAL, Settings

HANDSHAKE_S = 60.0
RETRY_S = 0.5  # at most, before the one more try

A = TypeVar("A", bound=Tolerant)
R = TypeVar("R", bound=Tolerant)
T = TypeVar("T")


def connect(settings: Settings, name: str) -> "Node":
    """An open connection to the node `name` of nodes.toml, or to this machine for `local`.

    Raises:
        ConfigError, HostKeyRefused, NodeUnreachable: it cannot be reached.
        ProtocolError: what answers is no hafs-node, or one of another version.
    """
    if name == LOCAL:
        node = Node(name, lambda: LocalTransport(rpc_argv(settings.node_root)))
    else:
        from campaigns.sync.ssh import connect_ssh  # loads paramiko

        node = Node(name, lambda: connect_ssh(settings, name))
    node.open()
    return node


def hafs_version() -> str:
    """The version of this package."""
    return importlib.metadata.version("hafs")


class Node:
    """Calls, uploads and downloads. `dial` makes a new transport whenever the old one is spent."""

    def __init__(self, name: str, dial: Callable[[], Transport]) -> None:
        self.name = name
        self._dial = dial
        self._transport: Transport | None = None
        self._pong: Pong | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def open(self) -> Pong:
        """Connect unless connected. Raises ProtocolError where the versions do not fit, and what the transport raises."""
        if self._pong is None:
            self.close()
            self._transport = self._dial()
            pong = self._ask(self._transport, PING, Nothing(), HANDSHAKE_S)
            self._require_protocol(pong)
            self._pong = pong
        return self._pong

    def close(self) -> None:
        transport, self._transport, self._pong = self._transport, None, None
        if transport is not None:
            transport.close()

    def call(self, verb: Verb[A, R], args: A, deadline_s: float = 60.0) -> R:
        """The node's answer to one request.

        Raises:
            NodeUnreachable: no answer within `deadline_s`, twice.
            ProtocolError: what came is no answer.
            HafsError: the class the node names, with its message and hint.
        """
        for attempt in tenacity.Retrying(
            stop=tenacity.stop_after_attempt(2),
            wait=tenacity.wait_random(0, RETRY_S),
            retry=tenacity.retry_if_exception_type(NodeUnreachable),
            reraise=True,
        ):
            with attempt:
                self.open()
                return self._ask(self._connected(), verb, args, deadline_s)
        raise AssertionError("tenacity re-raises the last error")

    def upload(self, source: Path, remote_path: str, offset: int, on_bytes: OnBytes) -> None:
        """Send a file from `offset` on, once. Raises NodeUnreachable (the next call reconnects), TransferError, StoreError."""
        self.open()
        self._spend(lambda: self._connected().upload(source, remote_path, offset, on_bytes))

    def download(self, remote_path: str, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
        """Fetch a file from `offset` on, once. Raises NodeUnreachable (the next call reconnects), TransferError."""
        self.open()
        self._spend(lambda: self._connected().download(remote_path, target, offset, on_bytes))

    @contextmanager
    def tunnel(self, url: str) -> Iterator[str]:
        """The URL at which this machine reaches a server of the node, for as long as the block lasts.

        It goes over the connection that is open now, and ends with it.
        """
        self.open()
        parts = urlsplit(url)
        with self._connected().tunnel(parts.hostname or "127.0.0.1", parts.port or 80) as (host, port):
            yield urlunsplit(parts._replace(netloc=f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))

    def _connected(self) -> Transport:
        if self._transport is None:
            raise NodeUnreachable(f"{self.name}: not connected")
        return self._transport

    def _ask(self, transport: Transport, verb: Verb[A, R], args: A, deadline_s: float) -> R:
        line = canonical_json(Request(verb=verb.name, args=args.model_dump(mode="json")).model_dump(mode="json")) + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ProtocolError(f"the request {verb.name} to {self.name} is longer than {MAX_LINE_BYTES} bytes")
        answer = self._spend(lambda: transport.exchange(line, deadline_s))
        try:
            reply = Reply.model_validate_json(answer)
            result = None if reply.result is None else verb.result.model_validate(reply.result)
        except ValidationError as error:
            self.close()
            raise self._garbage(answer) from error
        if reply.error is not None:
            raise _as_error(self.name, reply.error)
        if result is None:
            self.close()
            raise self._garbage(answer)
        return result

    def _spend(self, use: Callable[[], T]) -> T:
        """After a failure or Ctrl-C the connection may hold half a message: it is not used again."""
        try:
            return use()
        except TransferError:
            raise
        except BaseException:
            self.close()
            raise

    def _require_protocol(self, pong: Pong) -> None:
        if pong.protocol == PROTOCOL_VERSION:
            return
        self.close()
        older = self.name if pong.protocol < PROTOCOL_VERSION else "this machine"
        raise ProtocolError(
            f"{self.name} has hafs {pong.hafs} (protocol {pong.protocol}), this machine {hafs_version()} ({PROTOCOL_VERSION})",
            hint=f"install the newer hafs on {older}",
        )

    def _garbage(self, answer: bytes) -> ProtocolError:
        return ProtocolError(
            f"{self.name} answered something that is no reply of hafs-node: {answer[:200].decode('ascii', 'backslashreplace')}",
            hint="does a start-up file of its shell print something? what hafs-node prints must come first",
        )


def _as_error(name: str, error: JobError) -> HafsError:
    return error_named(error.code)(f"{name}: {error.message}", hint=error.hint)
