"""The embedded runtime of a test's own node, as long as the block lasts."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

START = "import sys, pathlib, trainer_node.runtime.launch as l; l.ensure_runtime(pathlib.Path(sys.argv[1]))"


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
