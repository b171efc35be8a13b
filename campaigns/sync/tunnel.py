"""A loopback port of this machine that leads to a port of the node, through the SSH connection that is open anyway.

Each connection gets a channel of its own. When either side ends, so does the other; when the block ends, all do.
"""

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

CHUNK_BYTES = 64 * 1024


class Channel(Protocol):
    """The part of a paramiko channel that is used."""

    def recv(self, nbytes: int) -> bytes: ...
    def sendall(self, s: bytes) -> None: ...
    def shutdown_write(self) -> None: ...
    def close(self) -> None: ...


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
    with suppress(OSError, EOFError):  # a broken side ends the loop that carries down, which closes both
        while chunk := client.recv(CHUNK_BYTES):
            channel.sendall(chunk)
        channel.shutdown_write()
