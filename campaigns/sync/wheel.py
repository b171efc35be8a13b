"""hafs as a wheel, made of the very files that run here: nothing is fetched or built, an installed hafs and a clone are alike.

The same files have the same hash, whichever zlib packs them.
"""

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.errors import ConfigError

PACKAGES = ("agents", "campaigns", "config", "trainer_node")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can name
WHEEL = "Wheel-Version: 1.0\nGenerator: hafs\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@dataclass(frozen=True)
class Wheel:
    """`sha256` is of its RECORD, which holds the hash of each file."""

    name: str
    sha256: str
    data: bytes


def own_wheel() -> Wheel:
    """The wheel of the hafs that runs. Raises ConfigError where its files or its metadata cannot be found."""
    distribution = importlib.metadata.distribution("hafs")
    info = f"hafs-{distribution.version}.dist-info"
    files = dict(_sources())
    for name in ("METADATA", "entry_points.txt"):
        text = distribution.read_text(name)
        if text is None:
            raise ConfigError(f"the installed hafs has no {name}", hint='install it with pip: pip install "hafs[laptop]"')
        files[f"{info}/{name}"] = text.encode()
    files[f"{info}/WHEEL"] = WHEEL.encode()
    record = files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    return Wheel(f"hafs-{distribution.version}-py3-none-any.whl", hashlib.sha256(record).hexdigest(), _zipped(files))


def _sources() -> Iterator[tuple[str, bytes]]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(f"the package {package} of hafs is not here", hint="install hafs again")
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _record(files: dict[str, bytes], own: str) -> bytes:
    """RECORD as the wheel format wants it: path, hash, size of every file, itself without."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        rows.writerow([name, f"sha256={digest}", len(data)])
    rows.writerow([own, "", ""])
    return text.getvalue().encode()


def _zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()
