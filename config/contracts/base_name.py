"""How a job names its base: a GGUF file or a folder of the node, `package:NAME`, or something of the Hugging Face hub.

The last is `hf:OWNER/REPO[@REVISION]/FILE.gguf`, one file, or `hf:OWNER/REPO[@REVISION]`, a whole repository with safetensors;
the revision is a branch, a tag or a commit. A name is checked here, where it is written down; whether the hub has such a thing
only the node can say. Each part is a file's name on every system.
"""

import re
from typing import NamedTuple

from config.contracts.names import is_portable

HUB = "hf:"
FORM = "hf:OWNER/REPO[@REVISION]/FILE.gguf, or hf:OWNER/REPO[@REVISION] for safetensors"
COMMIT = r"[0-9a-f]{40}"
SPLIT = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.gguf$")  # as llama-gguf-split names the parts of a file
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,95}"
_NAMED = re.compile(rf"hf:(?P<repo>{_PART}/{_PART})(@(?P<revision>{_PART}))?(/(?P<file>{_PART}(/{_PART})*))?")


class HubFile(NamedTuple):
    """A file of a repository; `file` empty: the whole of it. `revision` empty: that of the main branch."""

    repo: str
    revision: str
    file: str

    def __str__(self) -> str:
        """As it is written down."""
        at = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.repo}{at}" + (f"/{self.file}" if self.file else "")


def hub_file(base: str) -> HubFile:
    """What an `hf:` name means.

    Raises:
        ValueError: it is none, or a single file that is no GGUF; the text says what to write instead.
    """
    found = _NAMED.fullmatch(base)
    if found is None:
        raise ValueError(f"{base[:200]!r} names nothing of the hub: write {FORM}")
    named = HubFile(found["repo"], found["revision"] or "", found["file"] or "")
    parts = [*named.repo.split("/"), *filter(None, named.file.split("/"))]
    if ".." in base or "--" in named.repo or not all(map(is_portable, parts)):
        raise ValueError(f"{base!r}: the hub or a disk has no such name: write {FORM}")
    if SPLIT.search(named.file):
        raise ValueError(
            f"{base!r}: {named.file} is one of several parts: name a GGUF that is one file, or write hf:{named.repo}"
        )
    if named.file and not named.file.endswith(".gguf"):
        raise ValueError(
            f"{base!r}: {named.file} is no GGUF file; write hf:{named.repo} for the whole repository with its safetensors,"
            f" or name a .gguf file of a repository that has one (often OWNER/NAME-GGUF)"
        )
    return named


def is_plain(name: str) -> bool:
    """Whether what a repository calls a file is one part of a path, and means that file on every system."""
    return re.fullmatch(_PART, name) is not None and is_portable(name)


def checked_base(base: str) -> str:
    """`base`, refused with a ValueError where it begins as a name of the hub but is none."""
    if base.startswith(HUB):
        hub_file(base)
    return base
