"""Names that become files, whoever chose them, mean the same file on every system that either side may run on.

A grammar keeps paths and shell words out. Windows also gives some plain words to devices (NUL, con.txt) and drops a trailing
dot, so that two names would be one file.
"""

import re

from pydantic import AfterValidator

_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def is_portable(name: str) -> bool:
    """Whether every system keeps `name`, one part of a path, as a file of that name."""
    return not _DEVICE.fullmatch(name) and not name.endswith((".", " "))


def require_portable(path: str) -> str:
    """`path`, each of its parts looked at. Raises ValueError, as pydantic wants it."""
    for name in path.replace(":", "/").split("/"):
        if not is_portable(name):
            raise ValueError(f'Windows does not keep "{name}" as a file of that name')
    return path


Portable = AfterValidator(require_portable)  # in an Annotated, behind the grammar
