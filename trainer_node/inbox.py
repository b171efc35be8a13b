"""Data that arrives. Nothing unverified is ever visible: a segment enters the store only as a copy that this node has hashed.

    incoming/<sha>.part         packed bytes, as far as they have come; written by SFTP, trusted by nobody
    segments/<sha>.jsonl.zst    verified; never changed again
    datasets/<id>.json          a manifest whose segments are all here

The copy is made while hashing: a sender whose connection hangs may still write into the part, but never into the store.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import IO, cast

from config.contracts.job import TrainJob
from config.contracts.manifest import SHA256, DatasetManifest, Segment
from config.contracts.wire import DatasetResult, SegmentStatus
from config.errors import ConfigError, ProtocolError, TransferError, translate_os_errors
from config.files import sync_folder, write_atomic
from config.locks import alone

CHUNK_BYTES = 2**20
MAX_WINDOW_BYTES = 2**27  # what decompressing may hold in memory; zstd's own bound for streams


class Inbox:
    def __init__(self, root: Path) -> None:
        self.root = root

    def have(self, segment: Segment) -> SegmentStatus:
        """Whether the segment is here, else where to upload its packed bytes and from which offset."""
        if self._segment_file(segment.sha256).exists():
            return SegmentStatus(sha256=segment.sha256, present=True)
        part = self._part_file(segment.sha256)
        with translate_os_errors(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            offset = part.stat().st_size if part.exists() else 0
            if offset > segment.packed_bytes:  # packed by another zstd, or garbage: nothing in it can be continued
                part.unlink()
                offset = 0
        return SegmentStatus(sha256=segment.sha256, present=False, upload_path=part.as_posix(), offset=offset)

    def commit_segment(self, segment: Segment) -> SegmentStatus:
        """Verify an upload and take it into the store.

        Raises:
            TransferError: it is short (the part stays, to be continued), or not what was announced (the part is deleted).
            DiskFull, StoreError: the part stays.
        """
        target, part = self._segment_file(segment.sha256), self._part_file(segment.sha256)
        with alone(self.root / "incoming" / "commit.lock"), translate_os_errors(target):
            if not target.exists():
                _require_whole(segment, part)
                _take(segment, part, target)
            part.unlink(missing_ok=True)
        return SegmentStatus(sha256=segment.sha256, present=True)

    def commit_dataset(self, manifest: DatasetManifest) -> DatasetResult:
        """Make a dataset of segments that are all here. The same content again is the same dataset.

        Raises:
            TransferError: segments are missing.
        """
        missing = [s.sha256[:12] for s in manifest.segments if not self._segment_file(s.sha256).exists()]
        if missing or not manifest.segments:
            what = f"{len(missing)} of {len(manifest.segments)} segments are not on the node: {', '.join(missing[:5])}"
            raise TransferError(
                what if missing else f'the dataset "{manifest.name}" has no segments', hint="push again: it continues"
            )
        file = self._dataset_file(manifest.id)
        new = not file.exists()
        if new:
            write_atomic(file, manifest.model_dump_json(indent=1).encode())
        return DatasetResult(id=manifest.id, rows=manifest.rows, new=new)

    def require_dataset(self, job: TrainJob) -> None:
        """Raises TransferError for a dataset that is not here, ConfigError for one of the wrong kind."""
        if not re.fullmatch(SHA256, job.dataset_id):
            raise ProtocolError(f"{job.dataset_id[:80]!r} is no dataset id", hint="an id is 64 hexadecimal digits")
        file = self._dataset_file(job.dataset_id)
        if not file.exists():
            raise TransferError(f"dataset {job.dataset_id[:12]} is not on this node", hint="push it first: hafs sync push")
        kind = DatasetManifest.model_validate_json(file.read_bytes()).kind
        wanted = "pairs" if job.spec.kind == "dpo" else "samples"
        if kind != wanted:
            raise ConfigError(
                f"a {job.spec.kind} job trains on {wanted}, and dataset {job.dataset_id[:12]} holds {kind}", hint="check `data`"
            )

    # The three names below are made of a checked hash alone, so no path from the wire can leave the root.

    def _part_file(self, sha256: str) -> Path:
        return self.root / "incoming" / f"{_checked(sha256)}.part"

    def _segment_file(self, sha256: str) -> Path:
        return self.root / "segments" / f"{_checked(sha256)}.jsonl.zst"

    def _dataset_file(self, dataset_id: str) -> Path:
        return self.root / "datasets" / f"{_checked(dataset_id)}.json"


def _checked(sha256: str) -> str:
    if not re.fullmatch(SHA256, sha256):
        raise ProtocolError(f"{sha256[:80]!r} is no SHA-256", hint="64 hexadecimal digits in lower case")
    return sha256


def _require_whole(segment: Segment, part: Path) -> None:
    size = part.stat().st_size if part.exists() else 0
    if size < segment.packed_bytes:
        what = f"segment {segment.sha256[:12]}: {size} of {segment.packed_bytes} bytes have arrived"
        raise TransferError(what, hint="push again: it continues")


def _take(segment: Segment, part: Path, target: Path) -> None:
    copy = part.with_suffix(".copy")  # one name, so that a crash leaves at most one behind, and the next try writes over it
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _copy_verified(segment, part, copy)
        copy.replace(target)
        sync_folder(target.parent)
    except TransferError:
        part.unlink(missing_ok=True)
        raise
    finally:
        copy.unlink(missing_ok=True)


def _copy_verified(segment: Segment, part: Path, copy: Path) -> None:
    """Copy, hash and count in one pass; the copy is on the disk when this returns. Raises TransferError on any difference."""
    with part.open("rb") as source, copy.open("wb") as target:
        problem = _difference(segment, cast(IO[bytes], _Tee(source, target)))
        if problem:
            hint = "the part was deleted; push again. If it comes back, check the disk and memory of both machines"
            raise TransferError(f"segment {segment.sha256[:12]}: {problem}", hint=hint)
        target.flush()
        os.fsync(target.fileno())


def _difference(segment: Segment, packed: IO[bytes]) -> str:
    """What is wrong with the packed bytes; empty if nothing. Never unpacks more than one chunk beyond the announced size."""
    import zstandard

    digest, size, rows, last = hashlib.sha256(), 0, 0, b""
    try:
        lines = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(packed, read_across_frames=True)
        while size <= segment.bytes and (chunk := lines.read(CHUNK_BYTES)):
            digest.update(chunk)
            size, rows, last = size + len(chunk), rows + chunk.count(b"\n"), chunk[-1:]
    except zstandard.ZstdError as error:
        return f"not zstd: {error}"
    if size != segment.bytes:
        return f"{'more than' if size > segment.bytes else 'only'} {min(size, segment.bytes)} of {segment.bytes} bytes unpacked"
    if digest.hexdigest() != segment.sha256:
        return f"its content has SHA-256 {digest.hexdigest()[:12]}"
    if last != b"\n":
        return "its last line is cut off"
    return "" if rows == segment.rows else f"{rows} rows, not {segment.rows}"


class _Tee:
    """Hands on what it reads, and keeps it. Of a file it has what zstandard asks for: `read`."""

    def __init__(self, source: IO[bytes], target: IO[bytes]) -> None:
        self._source, self._target = source, target

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self._target.write(data)
        return data
