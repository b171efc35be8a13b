"""The node that is this machine: the same lines over a child process, the same offsets in file copies.

The child dies at a deadline, so neither a blocked write nor a blocked read outlives it; and it ends when its stdin does.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from campaigns.sync.transport import CHUNK_BYTES, OnBytes, not_started, require_line
from campaigns.sync.tunnel import Channel
from config.contracts.wire import MAX_LINE_BYTES
from config.errors import NodeUnreachable, TransferError

EXIT_GRACE_S = 5.0
SEND_S = 60.0  # a disk of this machine may be slow, but nothing can be lost on the way


def rpc_argv(root: Path) -> list[str]:
    """The command line of a local node process."""
    return [sys.executable, "-P", "-m", "trainer_node.cli", "rpc", "--root", str(root)]


class LocalTransport:
    """One child process. `argv` answers requests on its stdin with replies on its stdout."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._command = " ".join(argv)
        self._answered = False
        self._stderr = tempfile.TemporaryFile()  # a file, not a pipe: nobody has to drain it
        try:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
        except OSError as error:
            self._stderr.close()
            raise NodeUnreachable(f"cannot start {self._command}: {error.strerror}") from error

    def exchange(self, line: bytes, deadline_s: float) -> bytes:
        with self._killed_after(deadline_s):
            self._write(line)
            return self._read()

    def send(self, line: bytes, body: BinaryIO | None, on_bytes: OnBytes) -> None:
        with self._killed_after(SEND_S):
            self._write(line)
        while body and (chunk := body.read(CHUNK_BYTES)):
            with self._killed_after(SEND_S):
                self._write(chunk)
            on_bytes(len(chunk))

    def receive(self, deadline_s: float) -> bytes:
        with self._killed_after(deadline_s):
            return self._read()

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # the child is gone: `_read` says how it ended
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        try:
            answer = self._process.stdout.readline(MAX_LINE_BYTES + 1)
        except (OSError, ValueError):  # closed by an earlier error
            answer = b""
        if not answer.endswith(b"\n") and len(answer) <= MAX_LINE_BYTES:
            self._raise_ended()
        self._answered = True
        return require_line(answer, "the node process of this machine")

    def download(self, remote_path: str, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
        try:
            source = Path(remote_path).open("rb")
        except OSError as error:
            raise TransferError(f"cannot read {remote_path}: {error.strerror}") from error
        with source:
            _copy(source, target, offset, on_bytes)

    def channel(self, host: str, port: int) -> Channel:
        raise AssertionError("this machine reaches its own servers without a channel")

    def close(self) -> None:
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            try:
                process.stdin.close()
            except OSError:  # a half-written line of a child that is gone
                process.kill()
        try:
            process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._stderr.close()

    @contextmanager
    def _killed_after(self, deadline_s: float) -> Iterator[None]:
        """Raises NodeUnreachable where the block takes longer, whatever else it raises."""
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(deadline_s, kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            if expired.is_set():
                raise NodeUnreachable(f"the node process of this machine did not answer within {deadline_s:g} s")

    def _raise_ended(self) -> None:
        self._process.kill()  # it has closed its stdout: it will not answer again
        status = self._process.wait()
        if self._answered:
            raise NodeUnreachable(f"the node process of this machine ended with status {status}")
        self._stderr.seek(0)
        stderr = self._stderr.read().decode(errors="replace")
        hint = 'install the node\'s packages here: pip install "hafs[node]"'
        raise not_started("this machine", self._command, status, stderr, hint)


def _copy(source: BinaryIO, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
    source.seek(offset)
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        on_bytes(len(chunk))
