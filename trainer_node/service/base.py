"""What the three service managers have in common: how the daemon is called, and what a service can be asked.

A service runs the daemon alone. Stopping it never ends a job: runners live on, and the next daemon adopts them.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from config.errors import NodeError
from config.settings import plain_address

COMMAND_S = 60.0
KEPT = (
    *("HAFS_HOME", "HAFS_RUNTIME", "OLLAMA_HOST", "OLLAMA_MODELS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "SSL_CERT_FILE"),
)
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy")  # kept where they hold no password
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Definition:
    """What a service is to run. `environment`: what the daemon has to know of the shell that installs it."""

    name: str
    argv: tuple[str, ...]
    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What the daemon says before it has opened its own log."""
        return self.root / "service.log"


@dataclass(frozen=True)
class ServiceStatus:
    """`hint`: what to do, if anything."""

    installed: bool
    running: bool
    detail: str
    hint: str = ""


class Service(Protocol):
    """One service manager of this machine."""

    kind: str

    def install(self, definition: Definition) -> str:
        """Write, enable and (re)start. Returns what a person still has to do; empty: nothing. Raises NodeError."""
        ...

    def uninstall(self, name: str) -> bool:
        """Stop and remove. False if there was none. Raises NodeError."""
        ...

    def status(self, name: str) -> ServiceStatus: ...

    def command(self, name: str) -> str:
        """The command line of the installed service, its words as they are; empty if there is none."""
        ...


def define(root: Path, default_root: Path) -> Definition:
    """The service of `root`: the daemon of this very environment, for as long as the machine runs."""
    argv = (sys.executable, "-P", "-m", "trainer_node.cli", "daemon", "--root", str(root))
    kept = {name: os.environ[name] for name in (*KEPT, *PROXIES) if name in os.environ}
    environment = {name: value for name, value in kept.items() if name in KEPT or plain_address(value)}
    return Definition(service_name(root, default_root), argv, root, environment)


def service_name(root: Path, default_root: Path) -> str:
    """One service a root: two accounts or two roots of one machine do not meet. On Windows all accounts share the names."""
    if root == default_root and os.name != "nt":
        return "hafs-node"
    return f"hafs-node-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"


def run(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """A command of the service manager. Raises NodeError where it cannot be started or does not end."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=COMMAND_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NodeError(f"{' '.join(argv)}: {error}", hint="without a service a daemon starts with the next job") from error


def require(done: "subprocess.CompletedProcess[str]", what: str, hint: str) -> None:
    """Raises NodeError with the command's own words where it failed."""
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-400:]
        raise NodeError(f"{what}: {said or f'status {done.returncode}'}", hint=hint)
