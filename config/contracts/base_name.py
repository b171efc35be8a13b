"""How a job names its base: a GGUF file of the node, `package:NAME`, or a GGUF file of the Hugging Face hub.

The last is `hf:OWNER/REPO[@REVISION]/FILE.gguf`; the revision is a branch, a tag or a commit. A name is checked here, where it is
written down; whether the hub has such a file only the node can say. Each part is a file's name on every system.
"""

import re
from typing import NamedTuple

from config.contracts.names import is_portable

HUB = "hf:"
FORM = "hf:OWNER/REPO[@REVISION]/FILE.gguf"
COMMIT = r"[0-9a-f]{40}"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,95}"
_NAMED = re.compile(rf"hf:(?P<repo>{_PART}/{_PART})(@(?P<revision>{_PART}))?/(?P<file>{_PART}(/{_PART})*)")


class HubFile(NamedTuple):
    """A file of a repository. `revision` empty: that of the main branch."""

    repo: str
    revision: str
    file: str

    def __str__(self) -> str:
        """As it is written down."""
        at = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.repo}{at}/{self.file}"


def hub_file(base: str) -> HubFile:
    """What an `hf:` name means.

    Raises:
        ValueError: it is none, or no GGUF file; the text says what to write instead.
    """
    found = _NAMED.fullmatch(base)
    if found is None:
        raise ValueError(f"{base[:200]!r} names no file of the hub: write {FORM}")
    named = HubFile(found["repo"], found["revision"] or "", found["file"])
    parts = [*named.repo.split("/"), *named.file.split("/")]
    if ".." in base or "--" in named.repo or not all(map(is_portable, parts)):
        raise ValueError(f"{base!r}: the hub or a disk has no such name: write {FORM}")
    if not named.file.endswith(".gguf"):
        raise ValueError(
            f"{base!r}: only GGUF files can be trained, {named.file} is none; name a .gguf file of a repository that has one"
            f" (often OWNER/NAME-GGUF), or convert the model with llama.cpp's convert_hf_to_gguf.py and give the file's path"
        )
    return named


def checked_base(base: str) -> str:
    """`base`, refused with a ValueError where it begins as a name of the hub but is none."""
    if base.startswith(HUB):
        hub_file(base)
    return base
