"""A node over SSH: one connection, one channel for lines, one for files.

Every lower error is translated here, once. A host is logged in to only with the key pinned for it. Nothing waits without a
deadline: paramiko's own keepalive never notices a black hole, and some of its calls take no timeout.
"""

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import paramiko
from paramiko.hostkeys import HostKeyEntry
from paramiko.sftp import SFTPError

from campaigns.sync.channels import OrderedChannel, OrderedTransport
from campaigns.sync.hostkeys import HostKey, host_label, known_keys, pin, require_same, unknown
from campaigns.sync.ssh_config import Hop, route
from campaigns.sync.transport import CHUNK_BYTES, STALL_S, OnBytes, not_started, require_line
from config.contracts.wire import MAX_LINE_BYTES
from config.errors import ConfigError, NodeUnreachable, ProviderUnavailable, TransferError
from config.settings import NodeSettings, Settings

CONNECT_S = 15.0  # each step of logging in
SEND_BYTES = 128 * 1024  # a slow link moves so much before it counts as lost
EXIT_STATUS_S = 2.0
KEEPALIVE_S = 15
PREFETCH_BYTES = 16 * 2**20  # asked for at once; paramiko's own limit on requests is slow, and spins for ever after a cut
SEND_BUFFER_BYTES = 4 * 2**20
FAST = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # half the work of paramiko's own first choice, CTR with an HMAC
WEAK = {
    "ciphers": ["aes128-cbc", "aes192-cbc", "aes256-cbc", "3des-cbc"],
    "macs": ["hmac-sha1", "hmac-sha1-96", "hmac-md5", "hmac-md5-96"],
    "kex": ["diffie-hellman-group1-sha1", "diffie-hellman-group14-sha1", "diffie-hellman-group-exchange-sha1"],
    "keys": ["ssh-rsa", "ssh-dss"],
    "pubkeys": ["ssh-rsa", "ssh-dss"],
}
_LOWER_ERRORS = (paramiko.SSHException, SFTPError, EOFError, OSError)

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else its tracebacks reach stderr beside our errors


def rpc_command(node: NodeSettings) -> str:
    """The one constant remote command. The grammar of its parts holds no blank, quote or shell character."""
    return f"{node.command} rpc --root {node.root}" if node.root else f"{node.command} rpc"


def sftp_path(path: str) -> str:
    """A path of the node as its SFTP server wants it: POSIX paths as they are, D:\\dir\\file as /D:/dir/file."""
    return "/" + path.replace("\\", "/") if re.match(r"^[A-Za-z]:[\\/]", path) else path


def connect_ssh(settings: Settings, name: str) -> "SshTransport":
    """Log in to every machine on the way to node `name` and start its command.

    Raises:
        ConfigError: nodes.toml or the SSH configuration is wrong.
        HostKeyRefused: a host key on the way is unknown or has changed.
        NodeUnreachable: no answer, or no login.
    """
    with ExitStack() as opened:
        client, wire = _log_in_along(settings, name, opened)
        return SshTransport(name, rpc_command(settings.node(name)), client, wire, opened.pop_all())


@contextmanager
def open_shell(settings: Settings, name: str) -> Iterator["SshShell"]:
    """Log in to node `name` to run commands there. Raises as `connect_ssh`."""
    with ExitStack() as opened:
        client, wire = _log_in_along(settings, name, opened)
        yield SshShell(name, client, wire)


def fetch_host_key(settings: Settings, name: str) -> HostKey:
    """The first host key on the way to node `name` that is not pinned yet; the node's own where all are.

    Raises:
        HostKeyRefused: a key on the way has changed.
        ConfigError, NodeUnreachable: as `connect_ssh`.
    """
    hops = route(settings.node(name))
    known = known_keys(settings.known_hosts)
    with ExitStack() as opened:
        with _translated(name, _where(hops[0])):
            sock: socket.socket | paramiko.Channel = opened.enter_context(_tcp(hops[0]))
        for hop, after in pairwise(hops):
            if host_label(hop.host, hop.port) not in known:
                return _offered_key(name, hop, sock)
            sock = _through(name, opened.enter_context(_log_in(settings, name, hop, sock)), after)
        key = _offered_key(name, hops[-1], sock, known.get(host_label(hops[-1].host, hops[-1].port)))
        if key.host in known:
            require_same(settings.known_hosts, known[key.host], key, name)
        return key


def trust(settings: Settings, name: str, key: HostKey) -> None:
    """Pin `key`, which a person has compared, for a host on the way to node `name`.

    Raises:
        ConfigError: the key belongs to no host on that way.
        HostKeyRefused: another key is pinned for that host.
    """
    labels = [host_label(hop.host, hop.port) for hop in route(settings.node(name))]
    if key.host not in labels:
        raise ConfigError(f"{key.host} is not on the way to {name} ({', '.join(labels)})")
    pin(settings.known_hosts, key)


class SshTransport:
    """`client` is logged in to the node; all bytes go over `wire`; `opened` closes both and the jump hosts before the node."""

    def __init__(self, name: str, command: str, client: paramiko.SSHClient, wire: socket.socket, opened: ExitStack) -> None:
        self._name, self._command, self._client, self._wire, self._opened = name, command, client, wire, opened
        self._sftp: paramiko.SFTPClient | None = None
        self._answered = False
        self._buffer = bytearray()
        self._stderr = b""
        try:
            with _translated(name, name), _cut_after(self._wire, CONNECT_S):
                self._channel = self._session()
                self._channel.exec_command(command.encode())
        except BaseException:
            self.close()
            raise

    def exchange(self, line: bytes, deadline_s: float) -> bytes:
        end = time.monotonic() + deadline_s
        with (
            _translated(self._name, f"within {deadline_s:g} s"),
            _cut_after(self._wire, deadline_s + 1),
        ):  # recv has its own deadline, and the better words
            self._channel.settimeout(deadline_s)
            self._send(line)
            return self._line(end)

    def send(self, line: bytes, body: BinaryIO | None, on_bytes: OnBytes) -> None:
        with self._lost(), _cut_after(self._wire, STALL_S) as moved:
            self._channel.settimeout(STALL_S)
            self._send(line)
            while body and (chunk := body.read(SEND_BYTES)):
                self._send(chunk)
                moved()
                on_bytes(len(chunk))

    def receive(self, deadline_s: float) -> bytes:
        end = time.monotonic() + deadline_s
        with self._lost(), _cut_after(self._wire, deadline_s + 1):
            return self._line(end)

    def download(self, remote_path: str, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
        with _cut_after(self._wire, STALL_S) as moved:
            with self._file_errors(remote_path):
                source = self._files().open(sftp_path(remote_path), "rb")
                source.seek(offset)
                size = source.stat().st_size or 0
            for begin in range(offset, size, PREFETCH_BYTES):
                end = min(begin + PREFETCH_BYTES, size)
                with self._file_errors(remote_path):
                    source.prefetch(end)
                for place in range(begin, end, CHUNK_BYTES):
                    with self._file_errors(remote_path):
                        chunk = source.read(min(CHUNK_BYTES, end - place))
                    moved()
                    target.write(chunk)
                    on_bytes(len(chunk))
            with self._file_errors(remote_path):
                source.close()

    def channel(self, host: str, port: int) -> OrderedChannel:
        with _translated(self._name, f"its {host}:{port}"):
            try:
                return cast(OrderedTransport, _transport(self._client)).connect_to(host, port, CONNECT_S)
            except paramiko.ChannelException as error:  # the node's sshd says so: the connection is well
                what = f"{self._name} does not connect to its {host}:{port}: {error.text}"
                raise ProviderUnavailable(what, billable=False, hint="is the model server there running?") from error

    def close(self) -> None:
        self._opened.close()

    def _session(self) -> paramiko.Channel:
        channel = _transport(self._client).open_session(timeout=CONNECT_S)
        channel.settimeout(CONNECT_S)
        return channel

    def _files(self) -> paramiko.SFTPClient:
        if self._sftp is None:
            channel = self._session()
            channel.invoke_subsystem("sftp")
            self._sftp = paramiko.SFTPClient(channel)
            channel.settimeout(STALL_S)
        return self._sftp

    def _send(self, data: bytes) -> None:
        try:
            self._channel.sendall(data)
        except TimeoutError:
            raise
        except OSError:  # closed by the other side: what it said last is still to be read
            self._raise_ended()

    def _line(self, end: float) -> bytes:
        while (cut := self._buffer.find(b"\n")) < 0 and len(self._buffer) <= MAX_LINE_BYTES:
            self._receive(max(0.001, end - time.monotonic()))
        answer = bytes(self._buffer[: cut + 1] if cut >= 0 else self._buffer)
        del self._buffer[: len(answer)]
        self._answered = True
        return require_line(answer, self._name)

    def _receive(self, timeout_s: float) -> None:
        self._drain_stderr()
        self._channel.settimeout(timeout_s)
        chunk = self._channel.recv(CHUNK_BYTES)
        if not chunk:
            self._raise_ended()
        self._buffer += chunk

    def _drain_stderr(self) -> None:
        """Bytes nobody reads would fill the window and stop the other side."""
        while self._channel.recv_stderr_ready():
            self._stderr = (self._stderr + self._channel.recv_stderr(CHUNK_BYTES))[-2000:]

    def _raise_ended(self) -> NoReturn:
        self._channel.status_event.wait(EXIT_STATUS_S)
        self._drain_stderr()
        status = self._channel.exit_status  # -1: the connection went, not the command
        if self._answered or status < 0:
            raise NodeUnreachable(f"{self._name}: the connection was lost", hint="run the same command again: it continues")
        hint = f"install it: hafs nodes setup {self._name}; or write its path as command of [nodes.{self._name}] in nodes.toml"
        raise not_started(self._name, self._command, status, self._stderr.decode(errors="replace"), hint)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except _LOWER_ERRORS as error:
            what = f"{self._name}: the connection was lost: {_plain(error)}"
            raise NodeUnreachable(what, hint="run the same command again: it continues") from error

    @contextmanager
    def _file_errors(self, remote_path: str) -> Iterator[None]:
        """A status of the SFTP server is an OSError on a living connection; everything else means that it is lost."""
        try:
            yield
        except _LOWER_ERRORS as error:
            channel = self._sftp.get_channel() if self._sftp else None
            if isinstance(error, OSError) and not isinstance(error, TimeoutError) and channel is not None and not channel.closed:
                what = f"{self._name} refuses {remote_path}: {error}"
                raise TransferError(what, hint="is its disk full, or the folder not its user's?") from error
            what = f"{self._name}: the connection was lost while {remote_path} went over it"
            raise NodeUnreachable(what, hint="run the same command again: it continues where it stopped") from error


class SshShell:
    """Runs commands to their end, one after the other. For setting a node up alone: all else goes through `hafs-node rpc`."""

    def __init__(self, name: str, client: paramiko.SSHClient, wire: socket.socket) -> None:
        self.name, self._client, self._wire = name, client, wire

    def run(self, command: str, stdin: bytes, on_line: Callable[[str], None], silence_s: float) -> tuple[int, str]:
        """Exit status, and the end of what it wrote to stderr; each line of its stdout goes to `on_line`.

        Raises:
            NodeUnreachable: the connection was lost, or nothing came for `silence_s`.
        """
        stderr, rest = b"", b""
        with _translated(self.name, f"`{command}`"), _cut_after(self._wire, silence_s) as moved:
            channel = _transport(self._client).open_session(timeout=CONNECT_S)
            channel.settimeout(silence_s)
            channel.exec_command(command.encode())
            with suppress(OSError):  # it has ended already: its status says why
                channel.sendall(stdin)
                channel.shutdown_write()
            while chunk := channel.recv(CHUNK_BYTES):
                moved()
                while channel.recv_stderr_ready():
                    stderr = (stderr + channel.recv_stderr(CHUNK_BYTES))[-2000:]
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    on_line(line.decode(errors="replace").rstrip("\r"))
            channel.status_event.wait(EXIT_STATUS_S)
            while chunk := channel.recv_stderr(CHUNK_BYTES):
                stderr = (stderr + chunk)[-2000:]
            if channel.exit_status < 0:
                raise EOFError
        return channel.exit_status, stderr.decode(errors="replace").strip()


class _RefuseUnknown(paramiko.MissingHostKeyPolicy):
    def __init__(self, name: str, label: str) -> None:
        self._name, self._label = name, label

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise unknown(self._name, _host_key(self._label, key))


def _log_in_along(settings: Settings, name: str, opened: ExitStack) -> tuple[paramiko.SSHClient, socket.socket]:
    """Log in to every machine on the way to node `name`: the client of the last, and the wire that all bytes go over."""
    first, *others = route(settings.node(name))
    with _translated(name, _where(first)):
        wire = opened.enter_context(_tcp(first))
    client = opened.enter_context(_log_in(settings, name, first, wire))
    for hop in others:
        client = opened.enter_context(_log_in(settings, name, hop, _through(name, client, hop)))
    return client, wire


def _log_in(settings: Settings, name: str, hop: Hop, sock: "socket.socket | paramiko.Channel") -> paramiko.SSHClient:
    label = host_label(hop.host, hop.port)
    pinned = known_keys(settings.known_hosts).get(label)
    identities = [str(path) for path in (Path(text).expanduser() for text in hop.identities) if path.is_file()]
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(_RefuseUnknown(name, label))
    try:
        if pinned:
            _expect(client, pinned, settings.known_hosts)
        with _translated(name, _where(hop), identities):
            client.connect(
                hop.host,
                hop.port,
                username=hop.user,
                key_filename=cast(Any, identities),  # a list is documented, the stubs know a str only
                allow_agent=not hop.identities_only,
                look_for_keys=False,
                sock=sock,
                timeout=CONNECT_S,
                banner_timeout=CONNECT_S,
                auth_timeout=CONNECT_S,
                channel_timeout=CONNECT_S,
                disabled_algorithms=WEAK,
                transport_factory=cast(Any, _new_transport),  # a function is documented, the stubs know a class only
            )
            _transport(client).set_keepalive(KEEPALIVE_S)
    except paramiko.BadHostKeyException as error:
        client.close()
        if pinned:
            require_same(settings.known_hosts, pinned, _host_key(label, error.key), name)
        raise
    except BaseException:
        client.close()
        raise
    return client


def _new_transport(*args: Any, **options: Any) -> paramiko.Transport:
    transport = OrderedTransport(*args, **options)
    security = transport.get_security_options()
    security.ciphers = [*FAST, *(cipher for cipher in security.ciphers if cipher not in FAST)]
    return transport


def _expect(client: paramiko.SSHClient, pinned: HostKey, path: Path) -> None:
    entry = HostKeyEntry.from_line(pinned.line)
    if entry is None or entry.key is None:
        raise ConfigError(f"{path}: the key of {pinned.host} cannot be read", hint="remove its line and trust the node again")
    client.get_host_keys().add(pinned.host, pinned.type, entry.key)


def _offered_key(name: str, hop: Hop, sock: "socket.socket | paramiko.Channel", pinned: HostKey | None = None) -> HostKey:
    """A host may have several keys: one of the type that is pinned is asked for first, as in logging in."""
    with _translated(name, _where(hop)):
        transport = paramiko.Transport(sock, disabled_algorithms=WEAK)
        try:
            if pinned:
                security = transport.get_security_options()
                security.key_types = sorted(security.key_types, key=lambda kind: kind != pinned.type)
            transport.start_client(timeout=CONNECT_S)
            return _host_key(host_label(hop.host, hop.port), transport.get_remote_server_key())
        finally:
            transport.close()


def _tcp(hop: Hop) -> socket.socket:
    sock = socket.create_connection((hop.host, hop.port), timeout=CONNECT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if os.name == "nt":  # its small default makes uploads slow
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return sock


def _through(name: str, jump: paramiko.SSHClient, hop: Hop) -> paramiko.Channel:
    """A connection to `hop` from the machine that `jump` is logged in to."""
    with _translated(name, _where(hop)):
        return _transport(jump).open_channel("direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=CONNECT_S)


def _transport(client: paramiko.SSHClient) -> paramiko.Transport:
    transport = client.get_transport()
    if transport is None:
        raise EOFError("closed")
    return transport


@contextmanager
def _cut_after(wire: socket.socket, seconds: float) -> Iterator[Callable[[], None]]:
    """Shut the wire once `seconds` have passed since the start or the last call of what is yielded.

    Needed because some waits of paramiko have no timeout, among them a send into a full socket.
    """
    ended, end = threading.Event(), time.monotonic() + seconds

    def watch() -> None:
        while (left := end - time.monotonic()) > 0:
            if ended.wait(left):
                return
        with suppress(OSError):  # it has ended by itself just now
            wire.shutdown(socket.SHUT_RDWR)

    def moved() -> None:
        nonlocal end
        end = time.monotonic() + seconds

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield moved
    finally:
        ended.set()
        watcher.join()


def _host_key(label: str, key: paramiko.PKey) -> HostKey:
    return HostKey(label, key.get_name(), key.get_base64())


def _where(hop: Hop) -> str:
    return f"{hop.user}@{hop.host}:{hop.port}"


@contextmanager
def _translated(name: str, where: str, identities: list[str] | None = None) -> Iterator[None]:
    """Errors of a connection in plain words; a refused host key passes, `_log_in` has the pinned one to show."""
    try:
        yield
    except paramiko.BadHostKeyException:
        raise
    except paramiko.AuthenticationException as error:
        tried = ", ".join(identities or []) or "no key file"
        raise NodeUnreachable(
            f"{where} refuses the login (tried: {tried}, and the SSH agent where there is one): {error}",
            hint=f"set user and identity of [nodes.{name}] in nodes.toml; a key with a passphrase goes into the agent: ssh-add",
        ) from error
    except _LOWER_ERRORS as error:
        raise NodeUnreachable(
            f"{name} cannot be reached: {where}: {_plain(error)}",
            hint=f"is it on? try `ssh` to it; [nodes.{name}] is in nodes.toml",
        ) from error


def _plain(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "no such host name"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, EOFError):
        return "the connection was closed"
    return str(error) or type(error).__name__
