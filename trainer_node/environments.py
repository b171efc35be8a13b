"""The Python environments that a laptop made on this node: <root>/env/<version>-<hash>, never changed after they are whole.

An upgrade makes another one beside it. One that no process, no service and nobody else runs from is removed; a job's runner
keeps its own until it ends.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from config.errors import translate_os_errors
from trainer_node.service.install import service_command

FOLDER = "env"
WHOLE = "environment.json"  # written last by the setup that made it


def remove_unused(root: Path) -> list[str]:
    """Remove what nobody runs from, this process included. Returns the names. Raises StoreError."""
    folder = root / FOLDER
    there = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    removed = unused(there, [*_command_lines(), service_command(root), sys.prefix])
    with translate_os_errors(folder):
        for path in removed:
            (path / WHOLE).unlink(missing_ok=True)  # first, so that a setup never takes for whole what is half gone
            shutil.rmtree(path)
    return [path.name for path in removed]


def unused(environments: Iterable[Path], in_use: Iterable[str]) -> list[Path]:
    """Those that are named in no command line. A name is never the beginning of another: a separator follows, or the end."""
    lines = [os.path.normcase(line) + os.sep for line in in_use]
    return [path for path in environments if not any(os.path.normcase(str(path)) + os.sep in line for line in lines)]


def _command_lines() -> list[str]:
    import psutil

    lines = []
    for process in psutil.process_iter(["cmdline", "exe"]):  # what may not be seen comes as None
        lines += [*(process.info["cmdline"] or []), process.info["exe"] or ""]
    return lines
