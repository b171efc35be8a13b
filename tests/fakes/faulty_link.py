"""A relay before a server whose first connection ends at an exact byte, in one of three ways; the connections after it are well.

It also notes where one side stopped talking and the other began: between two messages of whatever protocol passes.
"""

import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal, NamedTuple, Self

Kind = Literal["cut", "truncate", "stall"]


class Fault(NamedTuple):
    """After `after` bytes `up` (to the server) or down: a reset; an orderly end; or silence in both directions."""

    kind: Kind
    up: bool
    after: int


class FaultyLink:
    def __init__(self, target: int, fault: Fault | None) -> None:
        self._target, self._fault = target, fault
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.struck = threading.Event()
        self.passed = {True: 0, False: 0}  # bytes of the first connection, up and down
        self.turns: list[tuple[bool, int]] = []  # where a direction fell silent because the other one spoke
        self._last: bool | None = None
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in [self._listener, *self._open]:
            _end(sock)
        for thread in self._threads:
            thread.join(10)
        for sock in [self._listener, *self._open]:
            sock.close()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # the test is over
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            self.connections += 1
            first = self.connections == 1
            self._start(self._pump, near, far, True, first)
            self._start(self._pump, far, near, False, first)

    def _pump(self, source: socket.socket, target: socket.socket, up: bool, first: bool) -> None:
        try:
            while data := source.recv(65536):
                if first and not self._pass(target, data, up):
                    return self._strike(source, target)
                if not first:
                    target.sendall(data)
        except OSError:  # ended by the other direction
            return
        _end(source)
        _end(target)

    def _pass(self, target: socket.socket, data: bytes, up: bool) -> bool:
        """Hand on what comes before the fault; False where that is not all."""
        with self._lock:
            if self.struck.is_set():
                return False
            if self._last is not None and self._last != up:
                self.turns.append((self._last, self.passed[self._last]))
            self._last = up
            fault = self._fault
            left = fault.after - self.passed[up] if fault and fault.up == up else len(data) + 1
            whole = len(data) < left
            self.passed[up] += min(len(data), left)
            if not whole:
                self.struck.set()
        target.sendall(data[:left])
        return whole

    def _strike(self, source: socket.socket, target: socket.socket) -> None:
        assert self._fault is not None
        if self._fault.kind == "stall":
            return  # neither end is closed
        for sock in (source, target):
            if self._fault.kind == "cut":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            _end(sock)


def _end(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # already ended
        return
