"""Packed segments on the laptop: whole lines, compressed with zstd, named by the SHA-256 of the packed bytes and never changed.

The name says what lies in the file and what goes over the wire; each frame has a checksum of the lines in it besides.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from config.contracts.manifest import Segment
from config.errors import StoreCorrupt, translate_os_errors
from config.files import replace

PIECE_BYTES = 2**20


@dataclass(frozen=True)
class SealedSegment:
    """`fresh`: packed just now, so no node can have it from here."""

    segment: Segment
    path: Path
    fresh: bool = False

    @property
    def sha256(self) -> str:
        return self.segment.sha256

    @property
    def packed_bytes(self) -> int:
        return self.segment.packed_bytes


def segment_file(out: Path, sha256: str) -> Path:
    """Where the packed bytes of a segment are."""
    return out / f"{sha256}.jsonl.zst"


@dataclass(frozen=True)
class Rows:
    """`count` rows that lie in `file` at these byte ranges. They are read when they are needed, a piece at a time."""

    file: Path
    ranges: tuple[tuple[int, int], ...]
    count: int

    def __iter__(self) -> Iterator[bytes]:
        with self.file.open("rb") as file:
            for start, end in self.ranges:
                file.seek(start)
                for place in range(start, end, PIECE_BYTES):
                    yield file.read(min(PIECE_BYTES, end - place))


def pack(out: Path, rows: Rows | bytes, count: int, level: int) -> SealedSegment:
    """Raises DiskFull, StoreError."""
    size, packed = 0, []
    packer = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj()
    with translate_os_errors(out):
        for piece in [rows] if isinstance(rows, bytes) else rows:
            packed.append(packer.compress(piece))
            size += len(piece)
        data = b"".join([*packed, packer.flush()])
        sha256 = hashlib.sha256(data).hexdigest()
        path = segment_file(out, sha256)
        fresh = not path.exists()
        _write(path, data)  # over what is there, which may be damaged
    return SealedSegment(Segment(sha256=sha256, rows=count, bytes=size, packed_bytes=len(data)), path, fresh)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, as long as the machine lives. It is a copy: after a power cut the node refuses what is not right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temp = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        replace(Path(temp), path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise


def unpack(sealed: SealedSegment) -> list[bytes]:
    """Its lines, with their ends. Raises StoreCorrupt where the file is not what it was."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(sealed.path.read_bytes())) as reader:
            lines = io.BufferedReader(reader).readlines()
    except (OSError, zstandard.ZstdError) as error:
        raise StoreCorrupt(f"{sealed.path} cannot be read: {error}", hint="remove it and run the same command again") from error
    if len(lines) != sealed.segment.rows:
        raise StoreCorrupt(f"{sealed.path} is not what it was", hint="remove it and run the same command again")
    return lines


def remove(sealed: SealedSegment) -> None:
    """Forget packed bytes that are wrong: the next seal packs these lines anew. Raises StoreError."""
    with translate_os_errors(sealed.path):
        sealed.path.unlink(missing_ok=True)
