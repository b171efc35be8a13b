"""Registry of the models this node made: <root>/registry.json. A version number is given out once and belongs to one job.

A version is reserved before anything is sent to the server and counts (is listed, can be started from) only after it
passed the smoke gate; the file is replaced whole, under a lock.
"""

import re
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from config.contracts.base import Tolerant
from config.contracts.job import PairScores, Perplexity
from config.contracts.wire import ModelVersion
from config.errors import JobFailed, JobNotFound
from config.files import write_atomic
from config.locks import alone

LOCK_WAIT_S = 30


class ModelRecord(Tolerant):
    """One version with its lineage. `digest` is the server's; `alias` is set on the version that carries it."""

    name: str
    version: int
    kind: str
    job: str
    base: str
    base_sha256: str
    dataset_id: str
    adapter_sha256: str
    start: str = ""  # dpo: the tag it went on from
    created_at: float = 0.0
    perplexity: Perplexity | None = None
    pairs: PairScores | None = None
    digest: str = ""
    alias: str = ""
    passed: bool = False

    @property
    def tag(self) -> str:
        return f"{self.name}:v{self.version}"

    @property
    def folder(self) -> str:
        """Its files, below the node's root: adapter/, adapter.gguf, job.json, metrics.jsonl and the statistics."""
        return f"models/{self.name}/v{self.version}"


class RegistryFile(Tolerant):
    models: list[ModelRecord] = []


def versions(root: Path) -> list[ModelVersion]:
    """All versions that passed the gate, oldest first."""
    return [
        ModelVersion(
            tag=record.tag,
            alias=record.alias,
            kind=record.kind,
            job=record.job,
            base=record.base,
            dataset_id=record.dataset_id,
            created_at=record.created_at,
            perplexity_base=record.perplexity.base if record.perplexity else None,
            perplexity_tuned=record.perplexity.tuned if record.perplexity else None,
        )
        for record in records(root)
        if record.passed
    ]


def resolve(root: Path, model: str) -> ModelRecord:
    """The version that `hafs-coder:v2` names, or the newest one of `hafs-coder`.

    Raises:
        JobNotFound: no such model was registered by this node.
    """
    passed = [record for record in records(root) if record.passed]
    name = model.removesuffix(":latest")
    found = [record for record in passed if name in (record.name, record.tag)]
    if not found:
        known = ", ".join(record.tag for record in passed) or "none"
        raise JobNotFound(f"no model {model!r} was made on this node", hint=f"models here: {known}")
    return max(found, key=lambda record: record.version)


def records(root: Path) -> list[ModelRecord]:
    """Every reserved version. Raises JobFailed where the file is broken: it is not rebuilt by guessing."""
    path = root / "registry.json"
    try:
        return RegistryFile.model_validate_json(path.read_bytes()).models
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise JobFailed(
            f"{path}: broken: {error.errors()[0]['msg']}", hint="restore it from a backup, or move it away"
        ) from error


def reserve(root: Path, draft: ModelRecord, tags: Iterable[str]) -> ModelRecord:
    """The record the job of `draft` already has, or a new one with the next free version number.

    Args:
        draft: its `version` is ignored.
        tags: what the server has now; a number that is taken there is free nowhere.
    """
    with alone(root / "registry.lock", deadline_s=LOCK_WAIT_S):
        known = records(root)
        own = next((record for record in known if record.job == draft.job), None)
        if own is not None:
            return own
        version_tag = re.compile(re.escape(draft.name) + r":v(\d+)", re.IGNORECASE)  # as the server compares names
        taken = [record.version for record in known if record.name == draft.name]
        taken += [int(match[1]) for tag in tags if (match := version_tag.fullmatch(tag))]
        record = draft.model_copy(update={"version": max(taken, default=0) + 1, "created_at": time.time()})
        _write(root, [*known, record])
        return record


def save(root: Path, record: ModelRecord) -> None:
    """Replace the record of that version; if it carries the alias, no other version of the name does."""
    with alone(root / "registry.lock", deadline_s=LOCK_WAIT_S):
        others = [other for other in records(root) if other.tag != record.tag]
        if record.alias:
            others = [other.model_copy(update={"alias": ""}) if other.alias == record.alias else other for other in others]
        _write(root, [*others, record])


def _write(root: Path, models: list[ModelRecord]) -> None:
    ordered = sorted(models, key=lambda record: (record.created_at, record.name, record.version))
    write_atomic(root / "registry.json", RegistryFile(models=ordered).model_dump_json(indent=1).encode())
