"""What the node can do without: parts of uploads, datasets, segments and bases that nothing names. What is in use never goes.

A dataset stays while a job names it, while it is the newest of its name, and for a week after it was last pushed. A segment stays
while a dataset names it that stays, and for a week after it was last asked for; a part for a week after its last byte. The GGUF
of a base, which is made for the model server and can be made again, stays for a week, while there is a version of that base, and
while any job has not ended: what a job's base is, only the job knows.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from config.contracts.job import JobView
from config.contracts.manifest import DatasetManifest
from config.contracts.wire import Garbage
from config.errors import StoreCorrupt, translate_os_errors
from config.faults import around
from config.locks import alone
from trainer_node.registry import records

KEPT_S = 7 * 24 * 3600.0


def collect(root: Path, jobs: Iterable[JobView], *, dry_run: bool) -> list[Garbage]:
    """Remove what nobody needs, or with `dry_run` only name it.

    Raises:
        StoreCorrupt: a manifest cannot be read, so nobody knows which segments it names. Nothing was removed.
        JobFailed: the registry cannot be read. Nothing was removed.
        StoreError: something cannot be removed.
    """
    jobs, before = list(jobs), time.time() - KEPT_S
    with alone(root / "datasets" / "gc.lock"), translate_os_errors(root):
        manifests = {path: _read(path) for path in (root / "datasets").glob("*.json")}
        kept = _kept(manifests, {job.dataset_id for job in jobs}, before)
        named = {segment.sha256 for path in kept for segment in manifests[path].segments}
        segments = [path for path in (root / "segments").glob("*") if path.name.partition(".")[0] not in named]
        bases = [] if any(not job.state.ended for job in jobs) else _bases_of_no_version(root)
        old = [path for path in (*segments, *_parts(root), *bases) if path.stat().st_mtime < before]
        going = [*(path for path in manifests if path not in kept), *old]
        garbage = [Garbage(name=path.relative_to(root).as_posix(), bytes=path.stat().st_size) for path in going]
        for path in [] if dry_run else going:  # the manifests first: none ever names a segment that is gone
            with around("garbage.remove"):
                os.unlink(path)
    return garbage


def _kept(manifests: dict[Path, DatasetManifest], in_jobs: set[str], before: float) -> set[Path]:
    pushed = {path: path.stat().st_mtime for path in manifests}
    newest = {manifests[path].name: path for path in sorted(manifests, key=lambda path: pushed[path])}
    return {path for path in manifests if path.stem in in_jobs or pushed[path] >= before} | set(newest.values())


def _parts(root: Path) -> Iterator[Path]:
    for pattern in ("*.part", "*.copy"):
        yield from (root / "incoming").glob(pattern)


def _bases_of_no_version(root: Path) -> list[Path]:
    """Also what a conversion left that was killed."""
    used = {record.base_sha256 for record in records(root) if not record.deleted}
    made = (path for pattern in ("*.gguf", "*.gguf.partial") for path in (root / "cache" / "bases").glob(pattern))
    return [path for path in made if path.name.partition(".")[0] not in used]


def _read(path: Path) -> DatasetManifest:
    try:
        return DatasetManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreCorrupt(f"{path} is no manifest of a dataset", hint="move it away, then run gc again") from error
