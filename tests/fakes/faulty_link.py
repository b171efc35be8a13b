"""A relay before a server whose first connection ends at an exact byte, in one of three ways; the connections after it are well.

It also notes where one side stopped talking and the other began: between two messages of whatever protocol passes.
"""

import socket
import struct
import threading
from typing import Literal, NamedTuple

from tests.fakes.relay import Link, end

Kind = Literal["cut", "truncate", "stall"]


class Fault(NamedTuple):
    """After `after` bytes `up` (to the server) or down: a reset; an orderly end; or silence in both directions."""

    kind: Kind
    up: bool
    after: int


class FaultyLink(Link):
    def __init__(self, target: int, fault: Fault | None) -> None:
        super().__init__(target)
        self._fault = fault
        self.struck = threading.Event()
        self.passed = {True: 0, False: 0}  # bytes of the first connection, up and down
        self.turns: list[tuple[bool, int]] = []  # where a direction fell silent because the other one spoke
        self._last: bool | None = None
        self._lock = threading.Lock()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool, first: bool) -> None:
        try:
            while data := source.recv(65536):
                if first and not self._pass(target, data, up):
                    return self._strike(source, target)
                if not first:
                    target.sendall(data)
        except OSError:  # ended by the other direction
            return
        end(source)
        end(target)

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
            end(sock)
