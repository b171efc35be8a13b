"""Checkpoints. A folder counts only with a COMPLETE.json that every file in it agrees with; it is written last.

What a crash left half written is never resumed from and never stands in the way of a whole one.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from pydantic import ValidationError

from config.contracts.base import Tolerant
from config.errors import translate_os_errors
from config.faults import around
from config.files import sync_folder, write_atomic

SEAL = "COMPLETE.json"


class SealedFile(Tolerant):
    bytes: int
    sha256: str


class Seal(Tolerant):
    files: dict[str, SealedFile]


def seal(folder: Path) -> None:
    """Make every file of the folder durable, then say so in COMPLETE.json."""
    files = {
        str(path.relative_to(folder).as_posix()): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    with translate_os_errors(folder):
        for path in files.values():
            with path.open("rb+") as file, around("checkpoint.sync"):
                os.fsync(file.fileno())
        with around("checkpoint.folders"):
            for below in {path.parent for path in files.values()} | {folder.parent}:
                sync_folder(below)
    sealed = {name: SealedFile(bytes=path.stat().st_size, sha256=_sha256(path)) for name, path in files.items()}
    with around("checkpoint.seal"):
        write_atomic(folder / SEAL, Seal(files=sealed).model_dump_json(indent=1).encode())


def is_complete(folder: Path) -> bool:
    """The folder is sealed, and every file is what the seal says."""
    try:
        files = Seal.model_validate_json((folder / SEAL).read_bytes()).files
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return False
    return all(_matches(folder / name, file) for name, file in files.items())


def newest_complete(folder: Path) -> Path | None:
    """The whole checkpoint-N with the highest N."""
    return next((path for path in sorted(_checkpoints(folder), key=step_of, reverse=True) if is_complete(path)), None)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints above `step`, the newest whole one: they are torn, and their steps will be written again."""
    for path in _checkpoints(folder):
        if step_of(path) > step:
            shutil.rmtree(path)


def step_of(checkpoint: Path | None) -> int:
    """The N of checkpoint-N; 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _matches(path: Path, file: SealedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and _sha256(path) == file.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
