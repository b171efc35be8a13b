"""Fetch a registered model. A file stands under its name only once its SHA-256 is right; a cut download goes on where it stopped.

Names come from the node and are checked before they become paths. Two nodes may have a version of one name: what a folder holds
is noted in it, and another model never takes its place.
"""

import hashlib
import os
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path

import tenacity
from pydantic import ValidationError

from campaigns.sync.remote import Node
from config.contracts.base import Tolerant
from config.contracts.job import MODEL_NAME
from config.contracts.names import is_portable
from config.contracts.wire import ARTIFACTS, Artifact, ArtifactsArgs, ArtifactsResult
from config.errors import NodeUnreachable, ProtocolError, StoreError, StoreHeld, TransferError, translate_os_errors
from config.files import sync_folder, write_atomic
from config.locks import FileLock
from config.settings import Settings

ATTEMPTS = 5
ARTIFACTS_S = 600.0  # the node hashes every file
_VERSION = re.compile(r"(?:[0-9]{1,4}(?:\.[0-9])?[mbt]-)?(v[0-9]{1,9})")  # with the size that the tag may have
ORIGIN = ".pulled.json"  # no artifact is called so: a node's names have no dot in front
ADAPTER = "adapter/adapter_model.safetensors"
OnProgress = Callable[[int, int], None]  # bytes done, bytes in all


class Origin(Tolerant):
    """What a folder holds: the version `tag` of `node`. `job` is empty where an older node did not say it."""

    node: str
    tag: str
    job: str = ""
    adapter_sha256: str = ""

    def __str__(self) -> str:
        return f"{self.tag} of node {self.node}" + (f", job {self.job}" if self.job else "")

    def same(self, other: "Origin") -> bool:
        """Whether it is the same model: nodes may be renamed."""
        return self.adapter_sha256 == other.adapter_sha256 and (self.job == other.job or not (self.job and other.job))


def pull(node: Node, settings: Settings, model: str, on_progress: OnProgress) -> Path:
    """Fetch the files of `model` (hafs-coder, or hafs-coder:v1) and return their folder, models/<name>/v<N>.

    Raises:
        ProtocolError: the node names something that is no model or no file below its folder.
        TransferError: a file arrived wrong twice, or cannot be read there.
        NodeUnreachable: the connection was lost too often; the same pull goes on later.
        StoreError, DiskFull: it cannot be written here, or another model is there; StoreHeld while another process pulls it.
    """
    return fetch(node, settings, node.call(ARTIFACTS, ArtifactsArgs(model=model), ARTIFACTS_S), on_progress)


def fetch(
    node: Node, settings: Settings, found: ArtifactsResult, on_progress: OnProgress, only: Container[str] | None = None
) -> Path:
    """The same for files that the node has listed: all of them, or those named in `only`."""
    folder = model_folder(settings, found.tag)
    wanted = [artifact for artifact in found.files if only is None or artifact.name in only]
    targets = [(artifact, _inside(folder, artifact.name)) for artifact in wanted]
    lock = FileLock(settings.home / "locks" / f"pull-{folder.parent.name}-{folder.name}.lock")
    if not lock.acquire():  # two that append to one .part could spoil a file that was found right already
        raise StoreHeld(f"another hafs pulls {found.tag} now", hint="wait for it")
    try:
        _claim(folder, node.name, found)
        _fetch_all(node, targets, on_progress)
    finally:
        lock.release()
    return folder


def _claim(folder: Path, node: str, found: ArtifactsResult) -> None:
    """Note whose the folder is, before its first file. Raises StoreError where another model has it."""
    adapter = next((artifact.sha256 for artifact in found.files if artifact.name == ADAPTER), "")
    ours = Origin(node=node, tag=found.tag, job=found.job, adapter_sha256=adapter)
    noted = _noted(folder / ORIGIN)
    if noted is None and _is_claimable(folder, adapter):
        return write_atomic(folder / ORIGIN, ours.model_dump_json().encode())
    if noted is None or not noted.same(ours):
        raise StoreError(
            f"{folder} holds {noted or 'what may be another model'}: {ours} is not put in its place",
            hint="move that folder to another place, and do this again",
        )


def _noted(path: Path) -> Origin | None:
    with translate_os_errors(path):
        try:
            return Origin.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def _is_claimable(folder: Path, adapter_sha256: str) -> bool:
    """Whether a folder without a note can be this model's: an earlier hafs pulled the same, or nothing in it is whole."""
    with translate_os_errors(folder):
        if (folder / ADAPTER).is_file():
            return _sha256(folder / ADAPTER) == adapter_sha256
        return not any(path.is_file() and path.suffix != ".part" for path in folder.rglob("*"))


def _fetch_all(node: Node, targets: Sequence[tuple[Artifact, Path]], on_progress: OnProgress) -> None:
    total, done = sum(artifact.bytes for artifact, _ in targets), 0
    for artifact, path in targets:

        def on_there(there: int, before: int = done) -> None:
            on_progress(before + there, total)

        _fetch(node, artifact, path, on_there)
        done += artifact.bytes
        on_progress(done, total)


def model_folder(settings: Settings, tag: str) -> Path:
    """Where the version `tag` (name:vN, name:14b-vN) is on the laptop. Raises ProtocolError for anything else."""
    name, _, rest = tag.partition(":")
    version = _VERSION.fullmatch(rest)
    if not re.fullmatch(MODEL_NAME, name) or not is_portable(name) or version is None:
        raise ProtocolError(f"the node names a model {tag[:100]!r}, which is not NAME:vN")
    return settings.models / name / version[1]


def _inside(folder: Path, name: str) -> Path:
    """The grammar of the name has no way out; a link inside the folder could be one."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ProtocolError(f"{path} leads out of {folder}", hint="a link lies there: remove it and pull again")
    return path


def _fetch(node: Node, artifact: Artifact, path: Path, on_there: Callable[[int], None]) -> None:
    if path.is_file() and path.stat().st_size == artifact.bytes and _sha256(path) == artifact.sha256:
        return
    part = path.with_name(f"{path.name}.part")
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        _download(node, artifact, part, on_there)
        if _sha256(part) == artifact.sha256:
            break
        part.unlink()
        if last:
            raise TransferError(
                f"{artifact.name} from {node.name} is not what the node says it is, twice",
                hint="pull again; did it change there?",
            )
    with translate_os_errors(path):
        os.replace(part, path)
        sync_folder(path.parent)


def _download(node: Node, artifact: Artifact, part: Path, on_there: Callable[[int], None]) -> None:
    for attempt in tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(initial=0.2, max=10),
        retry=tenacity.retry_if_exception_type(NodeUnreachable),
        reraise=True,
    ):
        with attempt, translate_os_errors(part), part.open("ab") as file:
            if file.tell() > artifact.bytes:
                file.truncate(0)
                file.seek(0)
            there = file.tell()

            def on_bytes(count: int) -> None:
                nonlocal there
                there += count
                on_there(there)

            if there < artifact.bytes:
                node.download(artifact.path, file, there, on_bytes)
            file.flush()
            os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with translate_os_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
