"""Models on the disk, laid out as Ollama does: blobs named by their SHA-256, a manifest of layers per name.

    blobs/sha256-<hex>
    manifests/<host>/<namespace>/<model>/<tag>

A name exists once its manifest is written, whole. A blob that no manifest lists is an upload whose create has not come yet: it is
only pruned at the next start. While a manifest cannot be read, the others are served and no blob is removed: it may list any.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config.errors import StoreCorrupt
from config.files import write_atomic

log = logging.getLogger("hafs")
MEDIA = "application/vnd.ollama.image."
DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG = "registry.ollama.ai", "library", "latest"
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


class ApiError(Exception):
    """An answer of the server that is an error: its HTTP status and its text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ModelName:
    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """`[[host/]namespace/]model[:tag]`. Raises ApiError (400)."""
        path, _, tag = text.rpartition(":") if ":" in text.rpartition("/")[2] else (text, "", DEFAULT_TAG)
        parts = path.split("/")
        host, namespace, model = [DEFAULT_HOST, DEFAULT_NAMESPACE, ""][: 3 - len(parts)] + parts if len(parts) <= 3 else ("",) * 3
        whole = PART.fullmatch(host) and NAMESPACE.fullmatch(namespace) and PART.fullmatch(model) and PART.fullmatch(tag)
        if not whole:
            raise ApiError(400, "invalid model name")
        return cls(host, namespace, model, tag)

    @property
    def full(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def __str__(self) -> str:
        """The shortest name that means this one, always with its tag."""
        return self.full.removeprefix(f"{DEFAULT_HOST}/").removeprefix(f"{DEFAULT_NAMESPACE}/")


@dataclass(frozen=True)
class Layer:
    """One blob of a model. `source` names the model it was taken from."""

    kind: str  # model, adapter, template, system, params, messages, license
    digest: str
    size: int
    source: str = ""

    def as_json(self) -> dict[str, Any]:
        entry = {"mediaType": MEDIA + self.kind, "digest": self.digest, "size": self.size}
        return entry | ({"from": self.source} if self.source else {})


@dataclass(frozen=True)
class Model:
    """A name and what its manifest lists, read."""

    name: ModelName
    digest: str  # hex, of the manifest
    modified: datetime
    size: int  # bytes of all layers
    config: dict[str, Any]
    layers: tuple[Layer, ...]
    store: "Store"

    @property
    def weights(self) -> Path | None:
        """None for what was made from an adapter alone: it cannot answer."""
        paths = self._paths("model")
        return paths[-1] if paths else None

    @property
    def adapters(self) -> tuple[Path, ...]:
        return self._paths("adapter")

    @property
    def parent(self) -> str:
        return next((layer.source for layer in reversed(self.layers) if layer.kind == "model"), "")

    @property
    def template(self) -> str | None:
        """A Go template; None: the one inside the GGUF."""
        return self._text("template")

    @property
    def system(self) -> str:
        return self._text("system") or ""

    @property
    def parameters(self) -> dict[str, Any]:
        text = self._text("params")
        return dict(json.loads(text)) if text else {}

    @property
    def messages(self) -> list[dict[str, Any]]:
        text = self._text("messages")
        return list(json.loads(text)) if text else []

    @property
    def licenses(self) -> list[str]:
        return [path.read_text(encoding="utf-8") for path in self._paths("license")]

    def _paths(self, kind: str) -> tuple[Path, ...]:
        return tuple(self.store.blob(layer.digest) for layer in self.layers if layer.kind == kind)

    def _text(self, kind: str) -> str | None:
        paths = self._paths(kind)
        return paths[-1].read_bytes().decode() if paths else None


class Store:
    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.manifests = folder / "manifests"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.manifests.mkdir(parents=True, exist_ok=True)

    def blob(self, digest: str) -> Path:
        """Raises ApiError (400) for what is no digest. Hex in upper case is another blob."""
        if not DIGEST.fullmatch(digest):
            raise ApiError(400, "invalid digest format")
        return self.blobs / digest.replace(":", "-", 1)

    def add(self, kind: str, data: bytes) -> tuple[Layer, bool]:
        """Store a small layer. True: it was there already."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        path = self.blob(digest)
        there = path.exists()
        if not there:
            write_atomic(path, data)
        return Layer(kind, digest, len(data)), there

    def models(self) -> list[Model]:
        """Every model that can be read, the last changed first."""
        found: list[Model] = []
        for path in self._manifest_files():
            try:
                found.append(self._read(path))
            except StoreCorrupt as error:
                log.warning("%s; %s", error, error.hint)
        return sorted(found, key=lambda model: model.modified, reverse=True)

    def find(self, text: str) -> Model | None:
        """The model of that name, letter case aside; None if there is none or the text is no name. Raises StoreCorrupt."""
        try:
            wanted = ModelName.parse(text)
        except ApiError:
            return None
        return next((self._read(path) for path in self._named(wanted)), None)

    def write(self, name: ModelName, config: dict[str, Any], layers: Iterable[Layer]) -> None:
        layer, _ = self.add("config", json.dumps(config).encode())
        head = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": layer.digest, "size": layer.size}
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": head,
            "layers": [layer.as_json() for layer in layers],
        }
        self._write_manifest(name, json.dumps(manifest).encode())

    def copy(self, source: Model, destination: ModelName) -> None:
        self._write_manifest(destination, self._manifest(source.name).read_bytes())

    def delete(self, model: Model) -> None:
        """Remove the name, and the blobs that only this model had."""
        manifest = self._manifest(model.name)
        owned = {entry["digest"] for entry in _entries(manifest)}
        manifest.unlink()
        self._discard_unused(self.blob(digest) for digest in owned)

    def prune(self) -> None:
        """Remove every blob that no manifest lists, and what is left of broken uploads. Only while nothing is being made."""
        self._discard_unused(self.blobs.iterdir())

    def _discard_unused(self, paths: Iterable[Path]) -> None:
        try:
            used = {self.blob(entry["digest"]) for path in self._manifest_files() for entry in _entries(path)}
        except StoreCorrupt as error:
            log.warning("%s; until then nothing is removed from %s", error, self.blobs)
            return
        for path in set(paths) - used:
            try:
                path.unlink(missing_ok=True)
            except PermissionError:
                continue  # Windows keeps a file that a loaded model maps: it goes at the next start

    def _manifest_files(self) -> list[Path]:
        """Without the temporary files of a manifest that is being written."""
        return [path for path in self.manifests.glob("*/*/*/*") if not path.name.startswith(".")]

    def _named(self, name: ModelName) -> list[Path]:
        wanted = name.full.casefold()
        return [path for path in self._manifest_files() if _name_of(path).full.casefold() == wanted]

    def _manifest(self, name: ModelName) -> Path:
        return self.manifests / name.host / name.namespace / name.model / name.tag

    def _write_manifest(self, name: ModelName, data: bytes) -> None:
        path = next(iter(self._named(name)), self._manifest(name))
        write_atomic(path, data)

    def _read(self, path: Path) -> Model:
        with _readable(path):
            data = path.read_bytes()
            manifest = json.loads(data)
            config = dict(json.loads(self.blob(manifest["config"]["digest"]).read_bytes()))
            layers = tuple(
                Layer(entry["mediaType"].removeprefix(MEDIA), entry["digest"], entry["size"], entry.get("from", ""))
                for entry in manifest["layers"]
            )
            size = sum(layer.size for layer in layers) + int(manifest["config"]["size"])
            modified = datetime.fromtimestamp(os.stat(path).st_mtime, UTC)
            return Model(_name_of(path), hashlib.sha256(data).hexdigest(), modified, size, config, layers, self)


def _name_of(path: Path) -> ModelName:
    return ModelName(*path.parts[-4:])


def _entries(path: Path) -> list[dict[str, Any]]:
    """Every layer that the manifest lists, with a digest. Raises StoreCorrupt."""
    with _readable(path):
        manifest = json.loads(path.read_bytes())
        entries = [manifest["config"], *manifest["layers"]]
        if not all(DIGEST.fullmatch(entry["digest"]) for entry in entries):
            raise ValueError("a layer without a digest")
        return entries


@contextmanager
def _readable(manifest: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ApiError) as error:
        raise StoreCorrupt(f"{manifest} cannot be read ({error})", hint="remove that file and create the model again") from error
