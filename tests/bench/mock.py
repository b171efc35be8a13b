"""The mock model server (tests/fakes/mock_models.py) as a child process."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = Path(__file__).parents[1] / "fakes" / "mock_models.py"


class Mock:
    """Runs as long as the block lasts; keywords are its environment, see there."""

    def __init__(self, port: int = 0, **settings: object) -> None:
        self._port = port
        self._environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}

    def __enter__(self) -> "Mock":
        command = [sys.executable, "-P", str(PROGRAM), str(self._port)]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self._environment)
        assert self._child.stdout is not None
        self.port = int(self._child.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        if self._child.stdout:
            self._child.stdout.close()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as reply:
            return json.load(reply)
