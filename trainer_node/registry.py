"""Registry of the models this node made: <root>/registry.json. A version number is given out once and belongs to one job.

A version is reserved before anything is sent to the server and counts (is listed, can be started from) only after it passed the
smoke gate. What was deleted keeps its record, so its number is not given out again and lineage leads through it. The file is
replaced whole, under a lock.

Which version an alias should name follows from the records alone (`standing`): promotions of a name are numbered, the last one
stands, and a rollback takes its number back. What the server's aliases name is the server's to say (trainer_node/aliases.py).
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from config.contracts.base import Tolerant
from config.contracts.job import PairScores, Perplexity, TrainJob
from config.contracts.wire import ModelVersion
from config.errors import JobFailed, JobNotFound
from config.faults import around
from config.files import write_atomic
from config.locks import alone

LOCK_WAIT_S = 30
OLLAMA: Literal["ollama"] = "ollama"
EMBEDDED: Literal["embedded"] = "embedded"
START_FILE = "start.json"


class ModelRecord(Tolerant):
    """One version with its lineage. `digest` is the server's; `aliases` are those it carried when the server was last seen.

    `promotion`: counts the promotions of its name; 0: never promoted, or rolled back. `fault`: why the gate stopped it.
    `quantized` is what the weights of a merged model really are, and `quantizer` made them so. `server`: where it was registered.
    """

    name: str
    version: int
    size: str = ""
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
    route: str = "adapter"
    quantized: str = ""
    quantizer: str = ""
    server: Literal["", "ollama", "embedded"] = ""  # "": nobody noted it
    digest: str = ""
    aliases: list[str] = []
    promotion: int = 0
    passed: bool = False
    fault: str = ""
    deleted: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_hafs(cls, raw: Any) -> Any:
        """Records once had one alias and no promotions: what had passed the gate was promoted, one after the other."""
        if isinstance(raw, dict) and "alias" in raw:
            raw = {**raw, "aliases": [raw["alias"]] if raw["alias"] else []}
            raw.setdefault("promotion", raw["version"] if raw.get("passed") else 0)
        return raw

    @property
    def tag(self) -> str:
        return f"{self.name}:{self.size}-v{self.version}" if self.size else f"{self.name}:v{self.version}"

    @property
    def latest(self) -> str:
        return f"{self.name}:latest"

    @property
    def wanted_aliases(self) -> list[str]:
        """Those that move to it when it is promoted."""
        return [*([f"{self.name}:{self.size}"] if self.size else []), self.latest]

    def is_called(self, tag: str) -> bool:
        """Whether that is its tag, or the short one without a size."""
        return tag.casefold() in (self.tag.casefold(), f"{self.name}:v{self.version}")

    @property
    def counts(self) -> bool:
        return self.passed and not self.deleted

    @property
    def folder(self) -> str:
        """Its files, below the node's root: adapter/, adapter.gguf or gguf/, Modelfile, job.json, metrics.jsonl, statistics."""
        return f"models/{self.name}/v{self.version}"

    def view(self, note: str = "") -> ModelVersion:
        return ModelVersion(
            tag=self.tag,
            alias=self.latest if self.latest in self.aliases else "",
            aliases=self.aliases,
            promoted=self.promotion > 0,
            route=self.route,
            quantized=self.quantized,
            fault=self.fault,
            note=note,
            kind=self.kind,
            job=self.job,
            base=self.base,
            dataset_id=self.dataset_id,
            created_at=self.created_at,
            perplexity_base=self.perplexity.base if self.perplexity else None,
            perplexity_tuned=self.perplexity.tuned if self.perplexity else None,
        )


class RegistryFile(Tolerant):
    models: list[ModelRecord] = []


def size_label(parameters: int) -> str:
    """How models of that many parameters are called at Ollama: 135m, 1.5b, 14b; "" below a million."""
    if parameters >= 4e9:
        return f"{int(parameters / 1e9)}b"
    if parameters >= 0.95e9:
        tenths = int(parameters / 1e8)
        return f"{tenths / 10:g}b" if tenths >= 10 else "1b"
    millions = parameters / 1e6
    if millions >= 100:
        return f"{round(millions / 5) * 5}m"
    return f"{millions:.0f}m" if millions >= 1 else ""


def versions(root: Path) -> list[ModelVersion]:
    """All versions that passed the gate, oldest first."""
    return [record.view() for record in records(root) if record.counts]


def resolve(root: Path, model: str, *, failed: bool = False) -> ModelRecord:
    """The version that a tag (hafs-coder:14b-v7, hafs-coder:v7), an alias or a name means, of those that passed the gate.

    Args:
        failed: a tag may also mean one that did not pass and is kept for inspection.

    Raises:
        JobNotFound: no such model was registered by this node.
    """
    known = records(root)
    kept = [record for record in known if failed and record.fault and not record.deleted and record.is_called(model)]
    return kept[0] if kept else find([record for record in known if record.counts], model)


def find(known: Sequence[ModelRecord], model: str) -> ModelRecord:
    """The same among `known`. A name or an alias means the version that stands for it, without one the newest of that name."""
    for record in known:
        if record.is_called(model):
            return record
    alias = alias_of(model)
    if (record_ := standing(known).get(alias)) is not None:
        return record_
    found = [record for record in known if alias in record.wanted_aliases]
    if not found:
        tags = ", ".join(record.tag for record in known if not record.deleted) or "none"
        raise JobNotFound(f"no model {model!r} was made on this node", hint=f"models here: {tags}")
    return max(found, key=lambda record: record.version)


def alias_of(model: str) -> str:
    """The alias that a name means; an alias or a tag as it is, in lower case."""
    return model.casefold() if ":" in model else f"{model.casefold()}:latest"


def standing(known: Iterable[ModelRecord]) -> dict[str, ModelRecord]:
    """The version that each alias should name: of those that it may name the one that was promoted last."""
    promoted = sorted((record for record in known if record.counts and record.promotion), key=lambda record: record.promotion)
    return {alias: record for record in promoted for alias in record.wanted_aliases}


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
    with held(root) as known:
        own = next((record for record in known if record.job == draft.job and not record.deleted), None)
        if own is not None:
            return own
        of_a_version = re.compile(re.escape(draft.name) + r":(?:.+-)?v(\d+)", re.IGNORECASE)  # as the server compares names
        taken = [record.version for record in known if record.name == draft.name]
        taken += [int(match[1]) for tag in tags if (match := of_a_version.fullmatch(tag))]
        record = draft.model_copy(update={"version": max(taken, default=0) + 1, "created_at": time.time()})
        write(root, [*known, record])
        return record


def save(root: Path, record: ModelRecord) -> None:
    """Replace the record of that version."""
    with held(root) as known:
        write(root, replaced(known, record))


def note(root: Path, record: ModelRecord, **figures: Any) -> ModelRecord:
    """Change these fields of a version, whatever else became of it meanwhile; the record as it is then."""
    with held(root) as known:
        now = next(each for each in known if (each.name, each.version) == (record.name, record.version))
        changed = now.model_copy(update=figures)
        write(root, replaced(known, changed))
        return changed


class StartPin(Tolerant):
    """start.json of a dpo job: the version that its first attempt went on from."""

    start: str


def pinned_start(job: Path) -> str:
    """In the folder of a job; "" while nothing is pinned."""
    try:
        return StartPin.model_validate_json((job / START_FILE).read_bytes()).start
    except (FileNotFoundError, ValidationError):
        return ""


def pin_start(job: Path, tag: str) -> None:
    """A name means another version once one is promoted; every attempt goes on from the same."""
    with around("start.pin"):
        write_atomic(job / START_FILE, StartPin(start=tag).model_dump_json().encode())


def starts(job: Path) -> list[str]:
    """What a job goes on from, or will: what it has pinned, and what it names."""
    try:
        named = TrainJob.model_validate_json((job / "job.json").read_bytes()).spec.start
    except (FileNotFoundError, ValidationError):
        named = ""
    return [each for each in (pinned_start(job), named) if each]


@contextmanager
def held(root: Path) -> Iterator[list[ModelRecord]]:
    """The records, which nobody else changes while the block lasts. Raises StoreHeld, JobFailed."""
    with alone(root / "registry.lock", deadline_s=LOCK_WAIT_S):
        yield records(root)


def replaced(known: Iterable[ModelRecord], *changed: ModelRecord) -> list[ModelRecord]:
    """`known` with the records of the same versions taken from `changed`."""
    new = {(record.name, record.version): record for record in changed}
    return [*(record for record in known if (record.name, record.version) not in new), *changed]


def write(root: Path, models: Iterable[ModelRecord]) -> None:
    """For the one who holds the lock."""
    ordered = sorted(models, key=lambda record: (record.created_at, record.name, record.version))
    with around("registry.write"):
        write_atomic(root / "registry.json", RegistryFile(models=ordered).model_dump_json(indent=1).encode())
