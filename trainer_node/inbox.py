"""Data that arrives. Nothing unverified is ever visible: a segment enters the store only once this node has hashed all of it.

    incoming/<sha>-*.part     packed bytes, as far as they have come; each connection writes a part of its own
    segments/<sha>.jsonl.zst  verified; never changed again
    datasets/<id>.json        a manifest whose segments are all here

Verified are the very bytes on their way into the part, so nothing is read back. A connection that hangs may still write into its
own part, never into another's or into the store. What a broken connection left is copied into the part of the next one.

Syncing to the disk and moving into the store go on in the background while the next segment arrives; `settle` waits for them.
"""

import io
import os
import re
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from config.contracts.job import TrainJob
from config.contracts.manifest import SHA256, DatasetManifest, Segment
from config.contracts.wire import DatasetResult, SegmentStatus
from config.errors import ConfigError, ProtocolError, TransferError, translate_os_errors
from config.faults import around
from config.files import sync_folder, write_atomic
from config.locks import alone
from trainer_node.arrival import Body, NotAnnounced, save_verified

STORERS = 4  # at a time: file systems that write a journal sync several files at the price of one
STORING = 8  # verified segments that may wait for the disk before the next one is taken


class Inbox:
    """For one thread. Close it, or what is verified may not be stored."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._disk: ThreadPoolExecutor | None = None
        self._storing: dict[str, Future[None]] = {}  # by hash, the oldest first

    def close(self) -> None:
        """End the background work. What went wrong in it was not confirmed to anybody: the segment is just not there."""
        if self._disk is not None:
            self._disk.shutdown()

    def have(self, segment: Segment) -> SegmentStatus:
        """Whether the segment is here, else from which offset on its packed bytes are missing."""
        file = self._segment_file(segment.sha256)
        with translate_os_errors(file):
            if file.exists():
                os.utime(file)  # somebody counts on it: it is young again for `sync gc`
            if file.exists() or segment.sha256 in self._storing:
                return SegmentStatus(sha256=segment.sha256, present=True)
            part = self._longest_part(segment)
            return SegmentStatus(sha256=segment.sha256, present=False, offset=part.stat().st_size if part else 0)

    def receive(self, segment: Segment, offset: int, body: Body) -> SegmentStatus:
        """Take the packed bytes from `offset` on, verify the whole, and store it in the background (see `settle`).

        Raises:
            TransferError: they end too early (the part stays, to be continued), or are not what was announced (it is deleted).
            DiskFull, StoreError: what has come stays.
        """
        target = self._segment_file(segment.sha256)
        if not target.exists() and segment.sha256 not in self._storing:
            with translate_os_errors(self.root / "incoming"):
                part = self._take(segment, offset, body)
            self._disk = self._disk or ThreadPoolExecutor(STORERS, "store")
            self.settle(STORING - 1)
            self._storing[segment.sha256] = self._disk.submit(_store, part, target)
        return SegmentStatus(sha256=segment.sha256, present=True)

    def settle(self, waiting: int = 0) -> None:
        """Return when all that was received, but `waiting` segments, is in the store and on the disk. Raises as `receive`."""
        while len(self._storing) > waiting:
            self._storing.pop(next(iter(self._storing))).result()
            if not self._storing:
                with around("segment.folder"):
                    sync_folder(self.root / "segments")

    def commit_dataset(self, manifest: DatasetManifest) -> DatasetResult:
        """Make a dataset of segments that are all here. The same content again is the same dataset.

        Raises:
            TransferError: segments are missing.
        """
        self.settle()
        with alone(self.root / "datasets" / "gc.lock"):
            missing = [s.sha256[:12] for s in manifest.segments if not self._segment_file(s.sha256).exists()]
            if missing or not manifest.segments:
                what = f"{len(missing)} of {len(manifest.segments)} segments are not on the node: {', '.join(missing[:5])}"
                raise TransferError(
                    what if missing else f'the dataset "{manifest.name}" has no segments', hint="push again: it continues"
                )
            file = self._dataset_file(manifest.id)
            new = not file.exists()
            with translate_os_errors(file):
                if new:
                    with around("dataset.write"):
                        write_atomic(file, manifest.model_dump_json(indent=1).encode())
                else:
                    os.utime(file)
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

    # The names below are made of a checked hash and numbers alone, so no path from the wire can leave the root.

    def _segment_file(self, sha256: str) -> Path:
        return self.root / "segments" / f"{_checked(sha256)}.jsonl.zst"

    def _dataset_file(self, dataset_id: str) -> Path:
        return self.root / "datasets" / f"{_checked(dataset_id)}.json"

    def _parts(self, segment: Segment) -> list[Path]:
        return list((self.root / "incoming").glob(f"{_checked(segment.sha256)}-*.part"))

    def _longest_part(self, segment: Segment) -> Path | None:
        return max(self._parts(segment), key=lambda part: part.stat().st_size, default=None)

    def _take(self, segment: Segment, offset: int, body: Body) -> Path:
        """A part with all of the segment, verified: it begins with what an earlier connection left."""
        left = self._longest_part(segment)
        part = self.root / "incoming" / f"{_checked(segment.sha256)}-{secrets.token_hex(4)}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _beginning(left, offset) as beginning, part.open("wb", buffering=0) as file:
                save_verified(segment, [beginning, body], file)
        except NotAnnounced as error:
            _remove(left, part)
            hint = "what had come of it was deleted; push again. If it comes back, check the disk and memory of both machines"
            raise TransferError(str(error), hint=hint) from error
        except BaseException:
            _remove(_shorter(left, part))  # another connection may be writing a third one
            raise
        _remove(left)
        return part


def _checked(sha256: str) -> str:
    if not re.fullmatch(SHA256, sha256):
        raise ProtocolError(f"{sha256[:80]!r} is no SHA-256", hint="64 hexadecimal digits in lower case")
    return sha256


def _beginning(part: Path | None, size: int) -> io.BytesIO:
    """The first bytes of what an earlier connection left. Raises TransferError where there are fewer."""
    data = b""
    if part is not None:
        with part.open("rb") as file:
            data = file.read(size)
    if len(data) < size:
        raise TransferError(f"only {len(data)} bytes are here, not {size}", hint="push again: it continues")
    return io.BytesIO(data)


def _shorter(left: Path | None, part: Path) -> Path | None:
    if left is None or not left.exists() or not part.exists():
        return None
    return left if part.stat().st_size >= left.stat().st_size else part


def _remove(*parts: Path | None) -> None:
    for part in parts:
        try:
            if part is not None:
                part.unlink(missing_ok=True)
        except PermissionError:  # Windows, where a connection that hangs has it open: `sync gc` takes it later
            continue


def _store(part: Path, target: Path) -> None:
    with translate_os_errors(target):
        if target.exists():  # it came over another connection meanwhile
            return _remove(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b") as file, around("segment.sync"):
            os.fsync(file.fileno())
        with around("segment.store"):
            os.replace(part, target)
