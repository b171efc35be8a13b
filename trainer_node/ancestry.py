"""How a version came to be, as far as the node knows: its record, its job, its data, and the version that it went on from.

What a deleted version left is its record alone; what is missing is empty, never guessed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.contracts.job import TrainJob
from config.contracts.manifest import DatasetManifest
from config.contracts.wire import Ancestor
from config.errors import JobFailed, JobNotFound
from trainer_node import aliases, registry
from trainer_node.dataset import read_manifest
from trainer_node.registry import ModelRecord


def chain(root: Path, model: str) -> list[Ancestor]:
    """The version that `model` means now, also one that did not pass, then what it went on from, and so on.

    Raises:
        JobNotFound: no such version.
    """
    known = registry.records(root)
    listed = aliases.listing(root)
    checked = {view.tag: view for view in [*listed.models, *listed.failed]}
    alias = registry.alias_of(model)
    wanted = next((tag for tag, view in checked.items() if alias in view.aliases), model)
    found: list[Ancestor] = []
    while wanted:
        try:
            record = registry.find(known, wanted) if found else _first(known, wanted)
        except JobNotFound:
            if not found:
                raise
            break  # made elsewhere, or by a registry that was moved away: `start` names it
        if any(record.tag == each.version.tag for each in found):
            break
        ancestor = _ancestor(root, record)
        found.append(ancestor.model_copy(update={"version": checked.get(record.tag, ancestor.version)}))
        wanted = record.start
    return found


def _first(known: Sequence[ModelRecord], wanted: str) -> ModelRecord:
    """A name means a version that passed where there is one."""
    try:
        return registry.find([each for each in known if each.counts], wanted)
    except JobNotFound:
        return registry.find([each for each in known if not each.deleted], wanted)


def _ancestor(root: Path, record: ModelRecord) -> Ancestor:
    job, manifest = _job(root, record), _manifest(root, record.dataset_id)
    paths = {each.sha256: root / "segments" / f"{each.sha256}.jsonl.zst" for each in (manifest.segments if manifest else [])}
    return Ancestor(
        version=record.view(),
        name=record.name,
        base_sha256=record.base_sha256,
        adapter_sha256=record.adapter_sha256,
        digest=record.digest,
        start=record.start,
        quantizer=record.quantizer,
        perplexity=record.perplexity,
        pairs=record.pairs,
        statistics=_json(root / record.folder / "training_stats.json"),
        spec=job.spec.model_dump(mode="json") if job else {},
        code=job.code_version if job else "",
        deleted=record.deleted,
        manifest=manifest,
        segments={sha256: path.as_posix() for sha256, path in paths.items() if path.exists()},
    )


def _job(root: Path, record: ModelRecord) -> TrainJob | None:
    """From the version's own files, or from the job's where those are gone."""
    for path in (root / record.folder / "job.json", root / "jobs" / record.job / "job.json"):
        try:
            return TrainJob.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    return None


def _manifest(root: Path, dataset_id: str) -> DatasetManifest | None:
    try:
        return read_manifest(root, dataset_id)
    except JobFailed:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}
