"""End what a test's nodes left running: daemons, runners and model servers live on by design."""

import json
from pathlib import Path

import psutil

from config.locks import holder

OURS = ("trainer_node", "hafs-node", "tests/fakes")


def end_nodes(below: Path) -> None:
    """Kill the processes of every node root below a folder, and wait until they are gone."""
    pids = {pid for lock in [*below.rglob("daemon.lock"), *below.rglob("runner.lock")] if (pid := holder(lock))}
    for file in below.rglob("runtime.json"):
        pids.add(json.loads(file.read_text())["pid"])
    for file in below.rglob("runner.json"):
        pids.add(json.loads(file.read_text())["pid"])
    trees = [process for pid in pids if psutil.pid_exists(pid) for process in _tree(pid)]
    for process in trees:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(trees, timeout=10)


def _tree(pid: int) -> list[psutil.Process]:
    """The process and its children; nothing if the pid is not one of hafs's any more."""
    try:
        process = psutil.Process(pid)
        if not any(name in part for part in process.cmdline() for name in OURS):
            return []
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
