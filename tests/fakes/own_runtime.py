"""The embedded runtime of a test: a process of its own, or that of a node, as long as a block lasts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fakes.waiting import wait_for
from trainer_node.runtime.launch import RuntimeInfo, find_runtime

SERVE = """\
import sys, pathlib
from trainer_node.runtime.server import serve
serve(pathlib.Path(sys.argv[1]), 0, *map(float, sys.argv[2:]))"""
START = "import sys, pathlib, trainer_node.runtime.launch as l; l.ensure_runtime(pathlib.Path(sys.argv[1]))"


def start(root: Path, *arguments: str, session: bool = False, **environment: str) -> "subprocess.Popen[bytes]":
    """A runtime on a free port, with a log in its root. `arguments`: the seconds after which it ends when idle."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "log").open("wb") as log:
        command = [sys.executable, "-P", "-c", SERVE, str(root), *arguments]
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=session)


def await_runtime(root: Path) -> RuntimeInfo:
    """Once it answers."""
    wait_for(f"runtime that answers (its log: {root / 'log'})", lambda: find_runtime(root), 40)
    found = find_runtime(root)
    assert found
    return found


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@contextmanager
def own_runtime(root: Path, **environment: str) -> Iterator[None]:
    """`environment` is that of the runtime and of the block."""
    with pytest.MonkeyPatch.context() as monkey:
        for name, value in {"HAFS_RUNTIME": "embedded", **environment}.items():
            monkey.setenv(name, value)
        subprocess.run([sys.executable, "-c", START, str(root)], cwd=Path(__file__).parents[2], check=True, timeout=100)
        server = psutil.Process(json.loads((root / "runtime" / "runtime.json").read_text())["pid"])
        try:
            yield
        finally:
            server.terminate()
            server.wait(20)
