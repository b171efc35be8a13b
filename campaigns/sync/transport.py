"""What carries lines and files between laptop and node.

A transport is one connection. After any NodeUnreachable or ProtocolError it is spent: a late answer could be taken for the
next one, so it is closed and a new one made. Bytes are not verified here: the receiving side hashes what arrived.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from campaigns.sync.tunnel import Channel
from config.contracts.wire import MAX_LINE_BYTES
from config.errors import ProtocolError, StoreError

CHUNK_BYTES = 256 * 1024
STALL_S = 15.0  # nothing moves for so long: the connection is lost
OnBytes = Callable[[int], None]  # called with the number of bytes that went since the last call


class Transport(Protocol):
    """Raises NodeUnreachable where the connection is lost or a deadline passes, TransferError where a file is refused."""

    def exchange(self, line: bytes, deadline_s: float) -> bytes:
        """Send one line (with its newline), return the one line that answers it, without its line end."""
        ...

    def send(self, line: bytes, body: BinaryIO | None, on_bytes: OnBytes) -> None:
        """Send one line and what is left of `body`, and wait for nothing: `receive` gives the answers, in their order."""
        ...

    def receive(self, deadline_s: float) -> bytes:
        """The next line, without its line end."""
        ...

    def download(self, remote_path: str, target: BinaryIO, offset: int, on_bytes: OnBytes) -> None:
        """Write `remote_path` from `offset` on to `target`, which stands at its own right place."""
        ...

    def channel(self, host: str, port: int) -> Channel:
        """One connection to the server that the node knows as `host`:`port`. Raises ProviderUnavailable where none listens."""
        ...

    def close(self) -> None: ...


def open_source(path: Path) -> BinaryIO:
    """A file of this machine to be sent. Raises StoreError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", hint="check that the file exists and is yours") from error


def require_line(answer: bytes, where: str) -> bytes:
    """`answer` without its line end. Raises ProtocolError where it is longer than the wire allows."""
    if len(answer) > MAX_LINE_BYTES:
        raise ProtocolError(
            f"{where} sent more than {MAX_LINE_BYTES} bytes without a line end: {answer[:200]!r}",
            hint="is its command really hafs-node, of the same version as here?",
        )
    return answer.rstrip(b"\r\n")


def not_started(where: str, command: str, status: int, stderr: str, hint: str) -> ProtocolError:
    """The command ended before it answered anything: it is missing, broken, or no hafs-node."""
    said = f": {stderr.strip()[-600:]}" if stderr.strip() else ""
    return ProtocolError(f"`{command}` on {where} ended with status {status} before it answered{said}", hint=hint)
