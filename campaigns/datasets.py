"""Names of data on the laptop: a campaign's samples, or a set of preference pairs. Both live in training/<name>/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaigns.rows import read_lines
from campaigns.sync.seal import SealedDataset, Sealing
from config.contracts.manifest import DataKind
from config.errors import ConfigError
from config.settings import Settings, require_name


def samples_file(settings: Settings, name: str) -> Path:
    return settings.training / require_name(name, "campaign") / "samples.jsonl"


def pairs_file(settings: Settings, name: str) -> Path:
    return settings.training / require_name(name, "set of pairs") / "pairs.jsonl"


def find(settings: Settings, name: str) -> tuple[DataKind, Path]:
    """What a name of data means. Raises ConfigError for a name that has no rows."""
    pairs, samples = pairs_file(settings, name), samples_file(settings, name)
    if pairs.exists():
        return "pairs", pairs
    if samples.exists() and samples.stat().st_size:
        return "samples", samples
    known = sorted({path.parent.name for path in settings.training.glob("*/*.jsonl")})
    raise ConfigError(f'no data named "{name}" in {settings.training}', hint=f"known: {', '.join(known) or 'none yet'}")


def has_rows(settings: Settings, name: str) -> bool:
    """Whether there is data of that name by now."""
    samples = samples_file(settings, name)
    return pairs_file(settings, name).exists() or (samples.exists() and samples.stat().st_size > 0)


def find_rejected(settings: Settings, name: str) -> Path:
    """The rejected rows of a campaign. Raises ConfigError where there is no such campaign."""
    from campaigns.status import CampaignStatus  # loads all that a campaign is made of: a push needs none of it

    return CampaignStatus(settings, name).files.rejected


def seal_named(settings: Settings, names: list[str]) -> SealedDataset:
    """Seal one or several names into one dataset. Raises as `sealing_named`, and what sealing raises."""
    with sealing_named(settings, names) as sealing:
        return sealing.finish()


def sealing_named(settings: Settings, names: list[str]) -> Sealing:
    """The same, to be pushed while it is being sealed. Raises ConfigError where samples and pairs are mixed."""
    found = [(name, *find(settings, name)) for name in names]
    kinds = {kind for _, kind, _ in found}
    if len(kinds) > 1:
        raise ConfigError(
            f"{', '.join(names)}: samples and pairs cannot be one dataset", hint="use samples for sft, pairs for dpo"
        )
    return Sealing([(name, path) for name, _, path in found], found[0][1], names[0], settings.segments)


def rows(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` rows of a JSONL file."""
    for number, row in enumerate(read_lines(path)):
        if number >= count:
            return
        yield row
