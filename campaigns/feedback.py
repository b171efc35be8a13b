"""feedback.jsonl: what people thought of answers. A row is on the disk when `keep` returns, with nothing left out."""

from pathlib import Path

from campaigns.rowfile import RowFile
from config.contracts.base import canonical_json
from config.contracts.feedback import Feedback
from config.errors import translate_os_errors
from config.files import sync_folder
from config.locks import alone
from config.settings import Settings


def keep(settings: Settings, feedback: Feedback) -> Path:
    """Append a row, whoever else does so now; what a crash tore off before is cut away. Returns the file.

    Raises:
        DiskFull, StoreError: it is not kept.
        StoreHeld: another process has had the file for a minute.
    """
    path = settings.feedback_file
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_suffix(".lock")):
            file, new = RowFile(path), not path.exists()
            try:
                file.open()
                file.append(canonical_json(feedback.model_dump(mode="json")) + b"\n")
            finally:
                file.close()
            if new:
                sync_folder(path.parent)
    return path
