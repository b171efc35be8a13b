"""What data this node has: a manifest is there only once all of its segments are verified."""

from pathlib import Path

from pydantic import ValidationError

from config.contracts.manifest import DatasetManifest
from config.contracts.wire import DatasetView

SHOWN = 200  # the newest; a person who looks wants no more


def datasets(root: Path) -> list[DatasetView]:
    """The datasets of a root, the newest first."""
    files = sorted((root / "datasets").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = []
    for path in files[:SHOWN]:
        try:
            manifest = DatasetManifest.model_validate_json(path.read_bytes())
        except ValidationError:  # of a newer hafs: a job that needs it says so
            continue
        rows = sum(segment.rows for segment in manifest.segments)
        at = path.stat().st_mtime
        found.append(DatasetView(id=path.stem, name=manifest.name, campaigns=manifest.campaigns, rows=rows, at=at))
    return found
