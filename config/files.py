"""Files that survive a crash: the new content is whole and on the disk before the old name points at it."""

import os
import random
import tempfile
import time
from pathlib import Path

from config.errors import translate_os_errors
from config.faults import around

SHARING_S = 5.0


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: temp file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        DiskFull, StoreError: the old file is untouched then.
    """
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temp = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                with around("file.sync"):
                    os.fsync(file.fileno())
            replace(Path(temp), path)
        except BaseException:
            Path(temp).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def replace(source: Path, target: Path) -> None:
    """Rename, whoever reads `target` meanwhile.

    Windows refuses while another process (a reader, a virus scanner) has the file open, which takes an instant: it is tried
    again for SHARING_S. Elsewhere a refusal is final.

    Raises:
        OSError: refused.
    """
    deadline = time.monotonic() + SHARING_S
    while True:
        try:
            with around("file.replace"):
                os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() >= deadline:
                raise
            time.sleep(random.uniform(0.01, 0.05))


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` durable. Windows has no such call: its rename is journalled."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with around("folder.sync"):
            os.fsync(handle)
    finally:
        os.close(handle)
