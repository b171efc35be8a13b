"""`hafs-node status`: what runs on this machine, for a person who sits at it. Nothing is started by looking."""

import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

from config.contracts.job import JobState
from config.errors import HafsError
from trainer_node.daemon import daemon_pid
from trainer_node.queue import Queue
from trainer_node.rpc import hafs_version
from trainer_node.service.install import status


def node_status(root: Path) -> dict[str, str]:
    """By name, in the order in which they are printed."""
    service, pid = status(root), daemon_pid(root)
    return {
        "hafs": hafs_version(),
        "environment": sys.prefix,
        "root": str(root),
        "service": service.detail + (f"\n{'':<12}{service.hint}" if service.hint else ""),
        "daemon": "not running" if pid is None else f"pid {pid or 'unknown'}",
        "jobs": _jobs(root),
    }


def _jobs(root: Path) -> str:
    """`2 QUEUED, 14 SUCCEEDED`, in the order of a job's life; or why nobody can tell."""
    if not (root / "state.sqlite").exists():
        return "none"
    try:
        with closing(Queue(root)) as queue:
            counts = Counter(job.state for job in queue.all())
    except HafsError as error:
        return f"{error}\n{'':<12}{error.hint}"
    return ", ".join(f"{counts[state]} {state}" for state in JobState if counts[state]) or "none"
