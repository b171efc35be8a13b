"""Preference pairs of a campaign: the right answer, and a wrong variant of it by one controlled change."""

from collections.abc import Callable
from pathlib import Path

from campaigns.datasets import pairs_file
from campaigns.domains.registry import domain
from campaigns.plan import Plan
from campaigns.rows import read_rows
from campaigns.spec import CampaignSpec, source_files
from campaigns.store import CampaignFiles
from config.contracts.base import content_id
from config.contracts.sample import PreferencePair, Sample
from config.errors import ConfigError
from config.files import write_atomic
from config.settings import Settings, require_name


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
