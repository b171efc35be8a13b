"""A campaign from its own folder: the spec it was started with, and that spec with another target or budget."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaigns.spec import CampaignSpec
from campaigns.store import CampaignFiles, read_spec
from config.errors import ConfigError, StoreHeld
from config.files import write_atomic
from config.locks import FileLock, holder


@dataclass(frozen=True)
class Revision:
    old: CampaignSpec
    new: CampaignSpec


def stored(files: CampaignFiles, *, max_usd: float | None = None) -> tuple[CampaignSpec, Path]:
    """The spec of a campaign and the folder where its relative sources start, with another budget if one is given.

    Raises:
        StoreCorrupt: campaign.json is none of this version.
    """
    return with_budget(read_spec(files), max_usd), Path(_record(files).get("folder") or ".")


def with_budget(spec: CampaignSpec, max_usd: float | None) -> CampaignSpec:
    """The spec under another limit in USD; None leaves its own."""
    if max_usd is None:
        return spec
    return spec.model_copy(update={"budget": spec.budget.model_copy(update={"max_usd": max_usd})})


def extend(files: CampaignFiles, *, target: int | None, by: int | None, max_usd: float | None) -> Revision:
    """Write another target (or `by` more samples) and budget into a campaign's own spec. It takes effect when it is resumed.

    Raises:
        ConfigError: nothing to change, both ways to say the target, or less than one sample.
        StoreHeld: the campaign is running.
    """
    if target is not None and by is not None:
        raise ConfigError("--target and --by both say the new target", hint="give one of them")
    if target is None and by is None and max_usd is None:
        raise ConfigError("nothing to change", hint="give --target N, --by N or --max-usd X")
    lock = FileLock(files.lock)
    if not lock.acquire():
        raise StoreHeld(
            f'campaign "{files.name}" is running (process {holder(files.lock)})',
            hint=f"stop it first: hafs campaign stop {files.name}",
        )
    try:
        old = read_spec(files)
        wanted = target if target is not None else old.target + (by or 0)
        if wanted < 1:
            raise ConfigError(f"a target of {wanted} samples", hint="a campaign makes one sample at least")
        new = with_budget(old.model_copy(update={"target": wanted}), max_usd)
        record = {**_record(files), "spec": new.model_dump(mode="json")}
        write_atomic(files.spec, json.dumps(record, indent=1).encode())
        return Revision(old, new)
    finally:
        lock.release()


def _record(files: CampaignFiles) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(files.spec.read_text(encoding="utf-8"))
    return record
