"""The GPU of a node as a lane's telemetry.

- A campaign never ends, and never waits, because of telemetry: where none comes in time there is no reading (None).
- One connection is kept open, the one that the node's lanes use too; a lost one is made again, after ever longer pauses. At
  most one call is under way.
- This machine is a node like any other, called `local`.
"""

import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from anyio import to_thread

from agents.gpu import Telemetry
from campaigns.sync.remote import Node, Nodes
from config.contracts.gpu import GpuReading
from config.contracts.wire import GPU, GpuResult, Nothing
from config.errors import HafsError, NodeUnreachable

log = logging.getLogger("hafs.campaign")

READ_S = 2.0  # what a reader waits at most
CALL_S = 10.0  # what a node gets to answer
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


@asynccontextmanager
async def open_telemetry(nodes: Nodes, kind: str) -> AsyncIterator[Telemetry]:
    """Telemetry of the node `kind` of nodes.toml, or of this machine for "local". Nothing is asked before the first reading.

    Raises:
        ConfigError: there is no node of that name.
    """
    node = nodes.get(kind)
    telemetry = NodeTelemetry(kind, lambda: node)
    try:
        yield telemetry
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(telemetry.close)


class NodeTelemetry:
    """Readings of one node. `dial` makes an open connection to it."""

    def __init__(self, name: str, dial: Callable[[], Node]) -> None:
        self._name, self._dial = name, dial
        self._node: Node | None = None
        self._busy = threading.Lock()
        self._closed = threading.Event()
        self._pause_s = 0.0  # after the last call; 0: it went well
        self._not_before = 0.0  # by time.monotonic
        self._said = ""  # what is wrong, as the log has it

    async def read(self) -> GpuReading | None:
        """The reading of now, within `READ_S`; None: there is none."""
        if time.monotonic() < self._not_before:
            return None
        with anyio.move_on_after(READ_S):
            return await to_thread.run_sync(self._ask_alone, abandon_on_cancel=True)  # a slow call goes on by itself
        return None

    def close(self) -> None:
        """Give the connection up. A call that is under way fails, and opens no new one for later."""
        self._closed.set()
        node, self._node = self._node, None
        if node is not None:
            node.close()

    def _ask_alone(self) -> GpuReading | None:
        """In a thread: a call, unless an earlier one is still under way."""
        if self._closed.is_set() or not self._busy.acquire(blocking=False):
            return None
        try:
            return self._ask()
        finally:
            self._busy.release()

    def _ask(self) -> GpuReading | None:
        node = self._node
        try:
            node = self._node = node or self._dial()
            result = node.call(GPU, Nothing(), CALL_S)
        except Exception as error:  # whatever it is, it is no reason to end a campaign
            self._note_failure(error)
            return None
        finally:
            if self._closed.is_set() and node is not None:
                node.close()
        self._note_answer(result)
        return result.reading

    def _note_failure(self, error: Exception) -> None:
        if self._closed.is_set():
            return
        if not isinstance(error, NodeUnreachable):  # an older hafs, a refused host key: a person has to do something first
            self._pause_s = _LONGEST_PAUSE_S
        self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
        self._not_before = time.monotonic() + self._pause_s
        hint = error.hint if isinstance(error, HafsError) else type(error).__name__
        self._say(f"no GPU telemetry of {self._name}: {error}{f' ({hint})' if hint else ''}; trying again")

    def _note_answer(self, result: GpuResult) -> None:
        self._pause_s = 0.0
        if result.missing:
            self._say(f"{self._name} cannot see its GPU ({result.missing})")
        elif self._said:
            self._said = ""
            log.info("GPU telemetry of %s is there", self._name)

    def _say(self, what: str) -> None:
        """Once, not at every reading."""
        if what != self._said:
            self._said = what
            log.warning("%s", what)
