"""A loopback port of this machine that leads to a server of a node, through the SSH connection that is open anyway.

- Each connection gets a channel of its own. When either side ends, so does the other; when the block ends, all do.
- A lost connection is made again by the next request that needs it, and a server that is no longer where it was is looked for
  again. What was under way is cut: its client sees that and asks again.
- Nothing waits in a black hole: a ping goes through the connection now and then, and without an answer the connection is spent.
- While there is no way, requests fail at once; a way is looked for again after ever longer pauses.
"""

import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from config.errors import HafsError, NodeUnreachable, ProviderUnavailable

log = logging.getLogger("hafs.campaign")

CHUNK_BYTES = 64 * 1024
PING_EVERY_S = 8.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0


class Channel(Protocol):
    """The part of a paramiko channel that is used."""

    def recv(self, nbytes: int) -> bytes: ...
    def sendall(self, s: bytes) -> None: ...
    def shutdown_write(self) -> None: ...
    def close(self) -> None: ...


class Far(Protocol):
    """A node, which threads may share."""

    name: str

    @property
    def here(self) -> bool: ...
    def channel(self, host: str, port: int) -> Channel: ...
    def ping(self) -> None: ...


@contextmanager
def tunnel(node: Far, url: str, find: Callable[[], str]) -> Iterator[str]:
    """The URL at which this machine reaches a server of the node, for as long as the block lasts.

    Args:
        url: where it is, as the node knows it; empty: that is still to be found.
        find: is asked for that again after a failure; it may raise HafsError.
    """
    if node.here:
        yield url
        return
    way = _Way(node, url, find)
    with forwarded(way.channel) as port, _pinged(node):
        yield urlunsplit(urlsplit(url)._replace(scheme="http", netloc=f"127.0.0.1:{port}"))


@contextmanager
def forwarded(open_channel: Callable[[], Channel]) -> Iterator[int]:
    """Listen on a free loopback port for as long as the block lasts; gives the port."""

    channels: set[Channel] = set()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            channel = open_channel()
            channels.add(channel)
            try:
                _join(self.request, channel)
            finally:
                channels.discard(channel)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True  # a channel that hangs must not keep the program alive
        block_on_close = False
        request_queue_size = 128  # a lane opens all its slots at once

        def handle_error(self, request: object, client_address: object) -> None:
            """A refused or broken channel closes the local connection: its client says so in its own words."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
            for channel in list(channels):
                channel.close()  # wakes the thread that reads from it, which closes the local side


class _Way:
    """Where the server is, found anew after a failure; for threads."""

    def __init__(self, node: Far, url: str, find: Callable[[], str]) -> None:
        self._node, self._find = node, find
        self._lock = threading.Lock()
        self._place = _place(url) if url else None
        self._pause_s = 0.0
        self._not_before = 0.0  # by time.monotonic

    def channel(self) -> Channel:
        """A connection to the server. Raises HafsError while there is no way to it."""
        place = self._found()
        try:
            return self._node.channel(*place)
        except (NodeUnreachable, ProviderUnavailable) as error:
            self._forget(place, error)
        return self._node.channel(*self._found())

    def _found(self) -> tuple[str, int]:
        """The place, asked for unless it is known: that connects again, and starts a server of hafs's own that has ended."""
        with self._lock:
            if self._place is None:
                if time.monotonic() < self._not_before:
                    raise NodeUnreachable(f"{self._node.name} was not to be reached a moment ago")
                try:
                    self._place = _place(self._find())
                except HafsError as error:
                    self._note_failure(error)
                    raise
                self._pause_s = 0.0
                log.info("%s is reached again", self._node.name)
            return self._place

    def _forget(self, place: tuple[str, int], error: HafsError) -> None:
        """Unless another thread has found a new one meanwhile: each search makes an object of its own."""
        with self._lock:
            if self._place is place:
                self._place = None
                log.warning("%s; connecting again", error)

    def _note_failure(self, error: HafsError) -> None:
        self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
        self._not_before = time.monotonic() + self._pause_s
        log.warning("%s; trying again", error)


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 80


@contextmanager
def _pinged(node: Far) -> Iterator[None]:
    """Ask for a sign of life now and then while the block lasts."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(PING_EVERY_S):
            try:
                node.ping()
            except HafsError as error:  # the connection is spent, and whoever needs it next is told
                log.info("%s", error)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _join(client: socket.socket, channel: Channel) -> None:
    """Carry bytes both ways until the node's side has ended."""
    up = threading.Thread(target=_carry_up, args=(client, channel), daemon=True)
    up.start()
    try:
        while chunk := channel.recv(CHUNK_BYTES):
            client.sendall(chunk)
    finally:
        channel.close()
        with suppress(OSError):  # the client has left already
            client.shutdown(socket.SHUT_RDWR)


def _carry_up(client: socket.socket, channel: Channel) -> None:
    try:
        while chunk := client.recv(CHUNK_BYTES):
            channel.sendall(chunk)
        channel.shutdown_write()
    except (OSError, EOFError):  # the client broke off, so that the server is to stop too; or the channel has ended
        channel.close()
