"""Names of data on the laptop: a campaign's samples, or a set of preference pairs. Both live in training/<name>/."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from campaigns.domains.registry import domain
from campaigns.plan import Plan
from campaigns.rows import read_lines, read_rows
from campaigns.spec import CampaignSpec, source_files
from campaigns.status import CampaignStatus
from campaigns.store import CampaignFiles
from campaigns.sync.seal import SealedDataset, seal
from config.contracts.base import content_id
from config.contracts.manifest import DataKind
from config.contracts.sample import PreferencePair, Sample
from config.errors import ConfigError
from config.files import write_atomic
from config.settings import Settings, require_name


def pairs_file(settings: Settings, name: str) -> Path:
    return settings.training / require_name(name, "set of pairs") / "pairs.jsonl"


def find(settings: Settings, name: str) -> tuple[DataKind, Path]:
    """What a name of data means. Raises ConfigError for a name that has no rows."""
    pairs, samples = pairs_file(settings, name), CampaignFiles(settings, name).samples
    if pairs.exists():
        return "pairs", pairs
    if samples.exists() and samples.stat().st_size:
        return "samples", samples
    known = sorted({path.parent.name for path in settings.training.glob("*/*.jsonl")})
    raise ConfigError(f'no data named "{name}" in {settings.training}', hint=f"known: {', '.join(known) or 'none yet'}")


def find_rejected(settings: Settings, name: str) -> Path:
    """The rejected rows of a campaign. Raises ConfigError where there is no such campaign."""
    return CampaignStatus(settings, name).files.rejected


def seal_named(settings: Settings, names: list[str]) -> SealedDataset:
    """Seal one or several names into one dataset. Raises ConfigError where samples and pairs are mixed."""
    found = [(name, *find(settings, name)) for name in names]
    kinds = {kind for _, kind, _ in found}
    if len(kinds) > 1:
        raise ConfigError(
            f"{', '.join(names)}: samples and pairs cannot be one dataset", hint="use samples for sft, pairs for dpo"
        )
    return seal([(name, path) for name, _, path in found], found[0][1], names[0], settings.home / "segments")


def rows(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` rows of a JSONL file."""
    for number, row in enumerate(read_lines(path)):
        if number >= count:
            return
        yield row


def make_pairs(settings: Settings, spec: CampaignSpec, folder: Path, name: str, tell: Callable[[str], None]) -> int:
    """Write training/<name>/pairs.jsonl: for each accepted sample one wrong variant of its answer, by a controlled change.

    Which change a sample gets follows from its id, so the same samples give the same pairs. Returns how many were made.

    Raises:
        ConfigError: the campaign has no samples, or `name` is a campaign.
    """
    files = CampaignFiles(settings, spec.name)
    if CampaignFiles(settings, require_name(name, "set of pairs")).exists():
        raise ConfigError(f'"{name}" is a campaign', hint="give the pairs a name of their own with --name")
    if not files.samples.exists():
        raise ConfigError(f'campaign "{spec.name}" has no samples', hint="run it first: hafs campaign start FILE")
    plan = Plan(spec, [domain(each) for each in spec.domains], {each: source_files(spec, each, folder) for each in spec.domains})
    lines = []
    for sample in read_rows(files.samples, Sample):
        pair = _pair(plan, sample)
        if pair is None:
            tell(f"left out {sample.id[:12]}: its cell is no longer in the sources")
        else:
            lines.append(pair.model_dump_json().encode() + b"\n")
    if not lines:
        raise ConfigError(
            f'no sample of "{spec.name}" can be made into a pair', hint=f"see what it holds: hafs data show {spec.name}"
        )
    write_atomic(pairs_file(settings, name), b"".join(lines))
    return len(lines)


def _pair(plan: Plan, sample: Sample) -> PreferencePair | None:
    cell = plan.cells.get((sample.domain, sample.provenance.cell))
    if cell is None:
        return None
    item, _ = plan.source_item(cell, sample.provenance.number)
    changes = list(cell.domain.changes(item, sample.completion))
    if item.id != sample.source_id or not changes:
        return None
    change = changes[int(sample.id[:8], 16) % len(changes)]
    return PreferencePair(
        id=content_id([sample.id, change.name, change.text]),
        domain=sample.domain,
        source_id=sample.source_id,
        messages=sample.messages,
        chosen=sample.completion,
        rejected=change.text,
        change=change.name,
        provenance=sample.provenance,
    )
