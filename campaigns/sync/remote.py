"""A node by name: typed calls over whichever transport reaches it.

A call is asked at most twice, the second time over a new connection; all verbs are idempotent, so a lost answer is harmless.
Every connection begins with the version handshake.
"""

import importlib
import importlib.metadata
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias, TypeVar

import tenacity
from pydantic import ValidationError

from campaigns.sync.local import LocalTransport, rpc_argv
from campaigns.sync.transport import OnBytes, Transport
from campaigns.sync.tunnel import Channel
from config.contracts.base import Tolerant, canonical_json
from config.contracts.job import JobError
from config.contracts.wire import MAX_LINE_BYTES, PING, PROTOCOL_VERSION, Nothing, Pong, Reply, Request, Verb
from config.errors import HafsError, NodeUnreachable, ProtocolError, TransferError, error_named
from config.settings import LOCAL, Settings

HANDSHAKE_S = 18.0
PING_S = 8.0
RETRY_S = 0.5  # at most, before the one more try

A = TypeVar("A", bound=Tolerant)
R = TypeVar("R", bound=Tolerant)
T = TypeVar("T")
Question: TypeAlias = tuple[Verb[Any, Any], Tolerant]  # with what is asked


def connect(settings: Settings, name: str) -> "Node":
    """An open connection to the node `name` of nodes.toml, or to this machine for `local`.

    Raises:
        ConfigError, HostKeyRefused, NodeUnreachable: it cannot be reached.
        ProtocolError: what answers is no hafs-node, or one of another version.
    """
    node = node_named(settings, name)
    node.open()
    return node


@contextmanager
def connecting(settings: Settings, name: str) -> Iterator[Callable[[], "Node"]]:
    """Connect while the block does other things first; what it is given waits for the connection, and raises as `connect`."""
    if name != LOCAL:
        importlib.import_module("campaigns.sync.ssh")  # first: two threads that load modules hinder each other
    with ThreadPoolExecutor(1, "connect") as beside:
        opening = beside.submit(connect, settings, name)
        try:
            yield opening.result
        finally:
            if opening.exception() is None:
                opening.result().close()


def node_named(settings: Settings, name: str) -> "Node":
    """The same, connected with its first call. Raises ConfigError for a name that nodes.toml does not have."""
    if name == LOCAL:
        return Node(name, lambda: LocalTransport(rpc_argv(settings.node_root)))
    settings.node(name)

    def dial() -> Transport:
        from campaigns.sync.ssh import connect_ssh  # loads paramiko

        return connect_ssh(settings, name)

    return Node(name, dial)


class Nodes:
    """The connections of one program: one a node, made with the first call and shared by all who need it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._nodes: dict[str, Node] = {}

    def get(self, name: str) -> "Node":
        """Raises ConfigError for a name that nodes.toml does not have."""
        if name not in self._nodes:
            self._nodes[name] = node_named(self._settings, name)
        return self._nodes[name]

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()


def hafs_version() -> str:
    """The version of this package."""
    return importlib.metadata.version("hafs")


def _ignore(count: int) -> None:
    """Bytes that nobody counts."""


def _twice() -> tenacity.Retrying:
    """A lost connection is made again, once."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(2),
        wait=tenacity.wait_random(0, RETRY_S),
        retry=tenacity.retry_if_exception_type(NodeUnreachable),
        reraise=True,
    )


class Node:
    """Calls, uploads and downloads. `dial` makes a new transport whenever the old one is spent.

    Threads may share it: their calls take turns. `close` waits for no turn, so a call that is under way fails.
    """

    def __init__(self, name: str, dial: Callable[[], Transport]) -> None:
        self.name = name
        self._dial = dial
        self._transport: Transport | None = None
        self._pong: Pong | None = None
        self._turn = threading.RLock()

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
        for attempt in _twice():
            with attempt, self._turn:
                self.open()
                return self._ask(self._connected(), verb, args, deadline_s)
        raise AssertionError("tenacity re-raises the last error")

    def ask(self, questions: Sequence[Question], deadline_s: float = 60.0) -> list[Any]:
        """The answers to several questions in one exchange, of which the handshake is part where the connection is new.

        For verbs that change nothing: a node of another protocol is asked, too. Raises as `call`.
        """
        for attempt in _twice():
            with attempt, self._turn:
                try:
                    return self._asked(questions, deadline_s)
                except BaseException:  # answers that nobody reads would be taken for the next ones
                    self.close()
                    raise
        raise AssertionError("tenacity re-raises the last error")

    def _asked(self, questions: Sequence[Question], deadline_s: float) -> list[Any]:
        lines = [self._request(verb, args, 0) for verb, args in questions]
        if self._pong is None:
            self.close()
            self._transport = self._dial()
            lines.insert(0, self._request(PING, Nothing(), 0))
        for line in lines:
            self._connected().send(line, None, _ignore)
        if self._pong is None:
            pong = self.reply(PING, HANDSHAKE_S)
            self._require_protocol(pong)
            self._pong = pong
        return [self.reply(verb, deadline_s) for verb, _ in questions]

    def alone(self) -> AbstractContextManager[object]:
        """While the block lasts, no other thread's calls come between those of this one."""
        return self._turn

    def post(self, verb: Verb[A, Any], args: A, body: BinaryIO | None = None, size: int = 0, on_bytes: OnBytes = _ignore) -> None:
        """Send a request, and the next `size` bytes of `body` to their end, without waiting: for `alone` and `reply`.

        Raises:
            NodeUnreachable: the answers to all that was posted are lost with the connection; the next call makes a new one.
        """
        self.open()
        line = self._request(verb, args, size)
        self._spend(lambda: self._connected().send(line, body, on_bytes))

    def reply(self, verb: Verb[Any, R], deadline_s: float) -> R:
        """The answer to the oldest request that was posted.

        Raises:
            NodeUnreachable: no sign of life within `deadline_s`.
            HafsError: as `call`.
        """
        while True:
            answer = self._spend(lambda: self._connected().receive(deadline_s))
            result = self._result(verb, answer)
            if result is not None:
                return result

    def download(self, remote_path: str, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
        """Fetch a file from `offset` on, once. Raises NodeUnreachable (the next call reconnects), TransferError."""
        self.open()
        self._spend(lambda: self._connected().download(remote_path, target, offset, on_bytes))

    @property
    def here(self) -> bool:
        """Whether the node is this machine, so that its servers are reached without a channel."""
        return self.name == LOCAL

    def channel(self, host: str, port: int) -> Channel:
        """A connection of its own to what the node knows as `host`:`port`.

        Raises:
            NodeUnreachable: the connection is lost; the next call makes a new one.
            ProviderUnavailable: nothing listens there.
        """
        with self._turn:
            self.open()
            transport = self._connected()
        try:
            return transport.channel(host, port)
        except NodeUnreachable:
            with self._turn:
                if self._transport is transport:
                    self.close()
            raise

    def ping(self) -> None:
        """Ask for a sign of life. Raises NodeUnreachable, and the connection with all its channels is spent."""
        self.call(PING, Nothing(), PING_S)

    def _connected(self) -> Transport:
        if self._transport is None:
            raise NodeUnreachable(f"{self.name}: not connected")
        return self._transport

    def _ask(self, transport: Transport, verb: Verb[A, R], args: A, deadline_s: float) -> R:
        line = self._request(verb, args, 0)
        answer = self._spend(lambda: transport.exchange(line, deadline_s))
        result = self._result(verb, answer)
        if result is None:
            self.close()
            raise self._garbage(answer)
        return result

    def _request(self, verb: Verb[A, Any], args: A, body_bytes: int) -> bytes:
        request = Request(verb=verb.name, args=args.model_dump(mode="json"), body_bytes=body_bytes)
        line = canonical_json(request.model_dump(mode="json")) + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ProtocolError(f"the request {verb.name} to {self.name} is longer than {MAX_LINE_BYTES} bytes")
        return line

    def _result(self, verb: Verb[Any, R], answer: bytes) -> R | None:
        """What the node says; None: only that a body is arriving. Raises the error that it names."""
        try:
            reply = Reply.model_validate_json(answer)
            result = None if reply.result is None else verb.result.model_validate(reply.result)
        except ValidationError as error:
            self.close()
            raise self._garbage(answer) from error
        if reply.error is not None:
            raise self._as_error(reply.error)
        if result is None and reply.arrived is None:
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
        raise ProtocolError(
            f"{self.name} has hafs {pong.hafs} (protocol {pong.protocol}), this machine {hafs_version()} ({PROTOCOL_VERSION})",
            hint=self._upgrade()
            if pong.protocol < PROTOCOL_VERSION
            else f'it needs hafs {pong.hafs} or newer here: pip install --upgrade "hafs[laptop]" on this machine',
        )

    def _as_error(self, error: JobError) -> HafsError:
        """What an older node does not understand is a matter of its version, whatever it advised in its day."""
        skewed = error.code == ProtocolError.__name__ and self._pong is not None and self._pong.hafs != hafs_version()
        return error_named(error.code)(f"{self.name}: {error.message}", hint=self._upgrade() if skewed else error.hint)

    def _upgrade(self) -> str:
        return f"give {self.name} the version of this machine, {hafs_version()}: hafs nodes upgrade {self.name}"

    def _garbage(self, answer: bytes) -> ProtocolError:
        return ProtocolError(
            f"{self.name} answered something that is no reply of hafs-node: {answer[:200].decode('ascii', 'backslashreplace')}",
            hint="does a start-up file of its shell print something? what hafs-node prints must come first",
        )
