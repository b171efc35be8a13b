"""Seal campaigns into segments that never change.

A segment holds whole lines, byte for byte as the campaign wrote them, and is named by the SHA-256 of its uncompressed bytes.
The same rows in the same campaigns give the same segments and the same dataset id; a campaign that has only grown keeps all
its segments but the last. Memory: one segment and 16 bytes (with their set) a row.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard
from pydantic import ValidationError

from config.contracts.manifest import DataKind, DatasetManifest, Segment
from config.contracts.sample import PreferencePair, Sample
from config.errors import StoreCorrupt, StoreError
from config.files import write_atomic

SEGMENT_BYTES = 32 * 2**20  # a segment closes with the line that reaches it
LEVEL = 3
_ROWS: dict[DataKind, type[Sample] | type[PreferencePair]] = {"samples": Sample, "pairs": PreferencePair}


@dataclass(frozen=True)
class SealedDataset:
    """`files` are the packed segments in the manifest's order. `torn`: files whose unfinished last line was left out."""

    manifest: DatasetManifest
    files: tuple[Path, ...]
    duplicates: int = 0
    torn: tuple[Path, ...] = ()


def seal(campaigns: Sequence[tuple[str, Path]], kind: DataKind, name: str, out: Path) -> SealedDataset:
    """Make a dataset called `name` of the JSONL files of `campaigns`, its segments below `out`.

    A row whose id came before, in this or an earlier campaign, falls out. No segment spans two campaigns.

    Raises:
        StoreCorrupt: a whole line is no row of this kind; file and line are named.
        StoreError: a file cannot be read, or there is no row at all.
    """
    sealing = _Sealing(kind, out)
    for _, path in campaigns:
        sealing.add(path)
    if not sealing.segments:
        names = ", ".join(campaign for campaign, _ in campaigns)
        raise StoreError(f"no rows to send in {names or 'no campaign'}", hint="run the campaign first, or name another one")
    manifest = DatasetManifest(name=name, kind=kind, campaigns=[campaign for campaign, _ in campaigns], segments=sealing.segments)
    return SealedDataset(manifest, tuple(sealing.files), sealing.duplicates, tuple(sealing.torn))


def segment_file(out: Path, sha256: str) -> Path:
    """Where the packed bytes of a segment are."""
    return out / f"{sha256}.jsonl.zst"


class _Sealing:
    def __init__(self, kind: DataKind, out: Path) -> None:
        self._row, self._out = _ROWS[kind], out
        self._seen: set[bytes] = set()
        self.segments: list[Segment] = []
        self.files: list[Path] = []
        self.torn: list[Path] = []
        self.duplicates = 0

    def add(self, path: Path) -> None:
        lines, rows = bytearray(), 0
        for line in self._new_lines(path):
            lines += line
            rows += 1
            if len(lines) >= SEGMENT_BYTES:
                self._close(lines, rows)
                lines, rows = bytearray(), 0
        if rows:
            self._close(lines, rows)

    def _new_lines(self, path: Path) -> Iterator[bytes]:
        """The whole lines of `path` whose row id was not seen yet."""
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        self.torn.append(path)
                    elif line.strip() and self._is_new(line, path, number):
                        yield line
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}", hint="check the name of the campaign") from error

    def _is_new(self, line: bytes, path: Path, number: int) -> bool:
        try:
            row = self._row.model_validate_json(line)
        except ValidationError as error:
            what = f"{path}:{number}: not a {self._row.__name__}: {error.errors()[0]['msg']}"
            raise StoreCorrupt(what, hint="look at that line; remove it if it cannot be mended") from error
        key = hashlib.blake2b(row.id.encode(), digest_size=16).digest()
        if key in self._seen:
            self.duplicates += 1
            return False
        self._seen.add(key)
        return True

    def _close(self, lines: bytearray, rows: int) -> None:
        sha256 = hashlib.sha256(lines).hexdigest()
        path = segment_file(self._out, sha256)
        if not path.exists():
            write_atomic(path, zstandard.ZstdCompressor(level=LEVEL).compress(lines))
        self.files.append(path)
        self.segments.append(Segment(sha256=sha256, rows=rows, bytes=len(lines), packed_bytes=path.stat().st_size))
