"""A dataset as a push leaves it on a node: a verified segment, and a manifest that names it."""

import hashlib
from pathlib import Path

import zstandard

from config.contracts.manifest import DataKind, DatasetManifest, Segment


def put_dataset(root: Path, lines: bytes, kind: DataKind = "samples") -> str:
    """The dataset's id."""
    packed = zstandard.compress(lines)
    sha256 = hashlib.sha256(packed).hexdigest()
    segment = Segment(sha256=sha256, rows=lines.count(b"\n"), bytes=len(lines), packed_bytes=len(packed))
    manifest = DatasetManifest(name="d", kind=kind, campaigns=["d"], segments=[segment])
    for folder in ("segments", "datasets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "segments" / f"{sha256}.jsonl.zst").write_bytes(packed)
    (root / "datasets" / f"{manifest.id}.json").write_text(manifest.model_dump_json())
    return manifest.id
