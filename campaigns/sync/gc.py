"""What the laptop can do without: packed segments that no record of a campaign names any more. All can be packed again.

What was used within a day stays, whoever used it: a push that runs may need it.
"""

import time
from pathlib import Path

from campaigns.sync.sealed_before import RECORD, named_segments
from config.contracts.wire import Garbage
from config.errors import translate_os_errors
from config.settings import Settings

KEPT_S = 24 * 3600.0


def collect(settings: Settings, *, dry_run: bool) -> list[Garbage]:
    """Remove it, or with `dry_run` only name it. Raises StoreError where something cannot be removed."""
    before = time.time() - KEPT_S
    with translate_os_errors(settings.segments):
        records = list(settings.segments.glob(f"*{RECORD}"))
        living = [record for record in records if _source(settings, record).exists()]
        needed = {name for record in living for name in named_segments(record)} | {record.name for record in living}
        others = [path for path in settings.segments.glob("*") if path.name not in needed]
        going = [path for path in others if path.stat().st_mtime < before]
        garbage = [Garbage(name=path.relative_to(settings.home).as_posix(), bytes=path.stat().st_size) for path in going]
        for path in [] if dry_run else going:
            path.unlink(missing_ok=True)
    return garbage


def _source(settings: Settings, record: Path) -> Path:
    """The file that the record is of."""
    name, _, kind = record.name.removesuffix(RECORD).rpartition(".")
    return settings.training / name / f"{kind}.jsonl"
