"""Relays: what passes between a client and a server on loopback, and how it may be disturbed."""

import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Link:
    """Passes connections on to the port `target`; a context manager. What passes is pumped by one thread a direction."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            end(sock)
        for thread in self._threads:
            thread.join(10)
        for sock in self._open:
            sock.close()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed: the test is over
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self._open += [near, far]
            self.connections += 1
            first = self.connections == 1
            self._start(self._pump, near, far, True, first)
            self._start(self._pump, far, near, False, first)

    def _pump(self, source: socket.socket, target: socket.socket, up: bool, first: bool) -> None:
        """Pass on what comes, `up` to the server or down, over the `first` connection or a later one."""
        raise NotImplementedError


class Relay(Link):
    """Passes connections on to `target`, the first one with a fault.

    It ends after `cut_after` bytes towards the target or `cut_back_after` bytes from it, or goes silent after `stall_after`.
    """

    def __init__(self, target: int, *, cut_after: int = 0, cut_back_after: int = 0, stall_after: int = 0) -> None:
        super().__init__(target)
        self._cut_after = {True: cut_after, False: cut_back_after}
        self._stall_after = stall_after
        self.passed = 0  # bytes towards the target, over all connections
        self._stalled = threading.Event()
        self._silenced: set[socket.socket] = set()
        self._ending: set[socket.socket] = set()

    def cut(self) -> None:
        """End every connection that is open now."""
        for sock in list(self._open):
            end(sock)

    def cut_at_answer(self) -> None:
        """End the connections that are open now as soon as something comes back over them; it gets lost."""
        self._ending.update(sock for sock in self._open if sock.getpeername()[1] == self.target)

    def stall(self) -> None:
        """Nothing passes any more over the connections that are open now, and none is closed."""
        self._silenced.update(self._open)

    def _pump(self, source: socket.socket, target: socket.socket, up: bool, first: bool) -> None:
        passed = 0
        cut_after = self._cut_after[up] if first else 0
        stall_after = self._stall_after if first and up else 0
        try:
            while data := source.recv(65536):
                passed += len(data)
                if up:
                    self.passed += len(data)
                if stall_after and passed >= stall_after:
                    self._stalled.set()
                    return  # neither end is closed
                if source in self._silenced:
                    return
                if source in self._ending or (cut_after and passed >= cut_after):
                    break
                target.sendall(data)
        except OSError:  # the other direction has ended it
            return
        finally:
            if not self._stalled.is_set() and source not in self._silenced:
                end(source)
                end(target)


def end(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # already ended
        return
