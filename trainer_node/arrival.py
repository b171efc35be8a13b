"""Verify a segment while it arrives: the very bytes that go into the file are hashed, nothing is read back.

Memory: a chunk, whatever is sent: reading ends with the chunk that goes beyond the announced size.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import IO, Protocol

from config.contracts.manifest import Segment
from config.errors import TransferError

CHUNK_BYTES = 2**18


class Body(Protocol):
    """Bytes on their way: `read` gives at most `size` of them as soon as there are any, none at their end."""

    def read(self, size: int, /) -> bytes: ...


class NotAnnounced(Exception):
    """What arrived is not the segment that was announced."""


def save_verified(segment: Segment, bodies: Iterable[Body], file: IO[bytes]) -> None:
    """Write the bodies, one after the other, into `file`; when this returns, it holds the segment.

    Raises:
        TransferError: they end too early; `file` has what came.
        NotAnnounced: they are something else.
    """
    digest, count = hashlib.sha256(), 0
    for chunk in _chunks(bodies):
        file.write(chunk)
        digest.update(chunk)
        count += len(chunk)
        if count > segment.packed_bytes:
            raise NotAnnounced(f"segment {segment.sha256[:12]}: more than its {segment.packed_bytes} bytes")
    if count < segment.packed_bytes:
        what = f"segment {segment.sha256[:12]}: {count} of {segment.packed_bytes} bytes have arrived"
        raise TransferError(what, hint="push again: it continues")
    if digest.hexdigest() != segment.sha256:
        raise NotAnnounced(f"segment {segment.sha256[:12]}: what arrived has SHA-256 {digest.hexdigest()[:12]}")


def _chunks(bodies: Iterable[Body]) -> Iterator[bytes]:
    for body in bodies:
        while chunk := body.read(CHUNK_BYTES):
            yield chunk
