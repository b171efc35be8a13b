"""The log of refused requests, <root>/rpc.log: a line each, bounded, whatever was in the request.

What a peer sent is written as Python's repr, cut short: it can neither fake a line nor fill the disk. Not being able to log
refuses nothing more and allows nothing more.
"""

import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from config.faults import around

MAX_BYTES = 2**20  # then the log moves aside, and one older one is kept
MAX_MESSAGE = 300

log = logging.getLogger("trainer_node.rpc")


def note_refusal(root: Path, code: str, message: str) -> None:
    """Write down that a request was refused. `code` is a class of config.errors."""
    peer = os.environ.get("SSH_CONNECTION", "").split(" ")[0] or "local"
    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} rpc[{os.getpid()}] {peer} {code} {message[:MAX_MESSAGE]!a}\n"
    path = root / "rpc.log"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MAX_BYTES:
            with around("refusals.move"):
                os.replace(path, path.with_suffix(".log.1"))
        with path.open("a", encoding="ascii") as file:
            file.write(line)
    except OSError as error:  # a full disk, or (on Windows) two that move it at once
        log.warning("cannot write %s: %s", path, error)
