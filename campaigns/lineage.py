"""Lineage: from a version back to every sample it was trained on, and to who wrote them for how much.

The node knows version, job, base and data; the rows themselves say which campaign, prompt and model they come from. Rows are read
from the segments that this laptop packed, else fetched from the node. What is gone on both sides is named as missing.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from campaigns.domains.registry import domain
from campaigns.status import CampaignStatus
from campaigns.sync.remote import Node
from campaigns.sync.segments import SealedSegment, segment_file, unpack
from config.contracts.base import Tolerant
from config.contracts.manifest import Segment
from config.contracts.sample import Provenance
from config.contracts.wire import LINEAGE, Ancestor, ModelArgs
from config.errors import ConfigError, NodeError, StoreCorrupt, StoreError, translate_os_errors
from config.settings import Settings, require_name

LINEAGE_S = 120.0


class Row(Tolerant):
    """What a sample and a pair both say of themselves."""

    id: str
    domain: str = ""
    source_id: str = ""
    provenance: Provenance = Provenance(campaign="", task_id="")


class Origin(NamedTuple):
    """Where a row of the dataset comes from. `sample` is the id of the accepted sample; a pair has one of its own."""

    id: str
    sample: str
    source_id: str
    campaign: str
    provider: str
    model: str
    prompt_sha256: str
    cost_usd: float


@dataclass
class Writer:
    """What one model wrote of a dataset, for one campaign. Cost in USD of the accepted answers; `prompts` are different ones."""

    campaign: str
    domain: str
    provider: str
    model: str
    rows: int = 0
    cost_usd: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompts: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Template:
    """The prompts' template as this version of hafs has it, and the system message that every row carries."""

    domain: str
    version: int
    system: str
    system_sha256: str


@dataclass(frozen=True)
class Campaign:
    """What this laptop has of a campaign. Cost in USD of all its calls, also of those that were rejected."""

    name: str
    target: int
    accepted: int
    rejected: int
    failed: int
    reasons: dict[str, int]
    cost_usd: float
    templates: list[Template]


@dataclass
class Step:
    """A version and its data. `missing` says in words what nobody knows any more."""

    version: Ancestor
    writers: list[Writer] = field(default_factory=list)
    campaigns: list[Campaign] = field(default_factory=list)
    samples: list[Origin] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def lineage(settings: Settings, node: Node, model: str) -> list[Step]:
    """The way back of a version: itself, then the version that it went on from, and so on.

    Raises:
        ConfigError: that can be no model's name.
        JobNotFound: the node has no such model.
        NodeError: it does not answer.
    """
    chain = node.call(LINEAGE, ModelArgs.typed(model), LINEAGE_S).chain
    steps = [_step(settings, node, ancestor) for ancestor in chain]
    if chain and chain[-1].start:
        steps[-1].missing.append(f"{chain[-1].start}, which it went on from, is not in the registry of {node.name}")
    return steps


def facts(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """For --json: with every sample."""
    return [
        {
            **step.version.model_dump(mode="json", exclude={"segments"}),
            "writers": [{**vars(writer), "prompts": len(writer.prompts)} for writer in step.writers],
            "campaigns": [
                {**vars(found), "templates": [vars(template) for template in found.templates]} for found in step.campaigns
            ],
            "samples": [origin._asdict() for origin in step.samples],
            "missing": step.missing,
        }
        for step in steps
    ]


def _step(settings: Settings, node: Node, ancestor: Ancestor) -> Step:
    step = Step(ancestor)
    if ancestor.deleted:
        step.missing.append(f"{ancestor.version.tag} was deleted on {node.name}: its files are gone")
    if not ancestor.spec:
        step.missing.append(f"job {ancestor.version.job}: {node.name} no longer has its spec")
    if ancestor.manifest is None:
        step.missing.append(f"dataset {ancestor.version.dataset_id[:12]}: {node.name} no longer has it, so its rows are unknown")
        return step
    writers: dict[tuple[str, str, str, str], Writer] = {}
    for segment in ancestor.manifest.segments:
        try:
            for row in _rows(settings, node, ancestor, segment):
                _count(row, writers, step.samples)
        except (StoreError, NodeError) as error:
            step.missing.append(f"segment {segment.sha256[:12]} with {segment.rows} rows: {error}")
    step.writers = sorted(writers.values(), key=lambda writer: -writer.rows)
    _add_campaigns(settings, step, {*ancestor.manifest.campaigns, *(writer.campaign for writer in step.writers)})
    return step


def _add_campaigns(settings: Settings, step: Step, names: set[str]) -> None:
    for name in sorted(names):
        try:
            step.campaigns.append(_campaign(settings, name))
        except ConfigError as error:
            if not _is_pairs(settings, name):
                step.missing.append(f"campaign {name} is not on this machine: {error}")
        except (StoreError, OSError) as error:
            step.missing.append(f"campaign {name} is on this machine, but cannot be read: {error}")


def _is_pairs(settings: Settings, name: str) -> bool:
    """A set of pairs is data, but no campaign: its rows name the campaigns."""
    try:
        return (settings.training / require_name(name, "set of pairs") / "pairs.jsonl").exists()
    except ConfigError:
        return False


def _rows(settings: Settings, node: Node, ancestor: Ancestor, segment: Segment) -> Iterator[Row]:
    """The rows of a segment. Raises StoreError, NodeError where neither side has them whole."""
    path = segment_file(settings.segments, segment.sha256)
    if path.exists() and _sha256(path) == segment.sha256:
        yield from _parsed(unpack(SealedSegment(segment, path)))
        return
    if segment.sha256 not in ancestor.segments:
        raise StoreError(f"neither this machine nor {node.name} has it any more")
    with tempfile.TemporaryDirectory(prefix="hafs-") as folder:
        fetched = Path(folder) / path.name
        with translate_os_errors(fetched), fetched.open("wb") as file:
            node.download(ancestor.segments[segment.sha256], file, 0, lambda count: None)
        if _sha256(fetched) != segment.sha256:
            raise StoreCorrupt(f"what {node.name} has of it is not what it was")
        yield from _parsed(unpack(SealedSegment(segment, fetched)))


def _parsed(lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        try:
            yield Row.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise StoreCorrupt(f"row {number} is none, so the rest was not read ({what})") from None


def _count(row: Row, writers: dict[tuple[str, str, str, str], Writer], samples: list[Origin]) -> None:
    made = row.provenance
    key = (made.campaign, row.domain, made.provider, made.model)
    writer = writers.setdefault(key, Writer(*key))
    writer.rows += 1
    writer.cost_usd += made.cost_usd
    writer.prompt_tokens += made.prompt_tokens
    writer.completion_tokens += made.completion_tokens
    writer.prompts.add(made.prompt_sha256)
    sample, prompt = made.task_id or row.id, made.prompt_sha256
    samples.append(Origin(row.id, sample, row.source_id, made.campaign, made.provider, made.model, prompt, made.cost_usd))


def _campaign(settings: Settings, name: str) -> Campaign:
    status = CampaignStatus(settings, name)
    return Campaign(
        name=name,
        target=status.spec.target,
        accepted=status.done,
        rejected=status.rejected.total(),
        failed=status.failed.total(),
        reasons=dict(status.reasons.most_common()),
        cost_usd=status.cost_usd,
        templates=[_template(each) for each in status.spec.domains],
    )


def _template(name: str) -> Template:
    found = domain(name)
    return Template(name, found.template_version, found.system, hashlib.sha256(found.system.encode()).hexdigest())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
