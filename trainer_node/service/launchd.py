"""A launchd agent of the user (macOS). It starts at log-in; AbandonProcessGroup lets a job outlive the daemon's stop."""

import os
import plistlib
import sys
from pathlib import Path

from config.files import write_atomic
from trainer_node.service.base import Definition, Run, ServiceStatus, require, run

PREFIX = "org.hafs."
UNATTENDED = "it starts at log-in: for a Mac that nobody logs in to, switch automatic log-in on in System Settings"


def plist_bytes(definition: Definition) -> bytes:
    """The property list of the agent."""
    return plistlib.dumps(
        {
            "Label": PREFIX + definition.name,
            "ProgramArguments": list(definition.argv),
            "EnvironmentVariables": definition.environment,
            "WorkingDirectory": str(definition.root),
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 15,
            "AbandonProcessGroup": True,
            "ProcessType": "Standard",
            "StandardOutPath": str(definition.log),
            "StandardErrorPath": str(definition.log),
        }
    )


class Launchd:
    kind = "launchd agent"

    def __init__(self, run: Run = run, folder: Path | None = None) -> None:
        self._run = run
        self._folder = folder or Path("~/Library/LaunchAgents").expanduser()
        self._uid = os.getuid() if sys.platform != "win32" else 0

    def install(self, definition: Definition) -> str:
        definition.root.mkdir(parents=True, exist_ok=True)
        path = self._path(definition.name)
        self._bootout(definition.name)
        write_atomic(path, plist_bytes(definition))
        done = self._run(["launchctl", "bootstrap", f"gui/{self._uid}", str(path)])
        if done.returncode:  # nobody is logged in at the screen
            done = self._run(["launchctl", "bootstrap", f"user/{self._uid}", str(path)])
        require(done, f"launchd does not start {path.name}", "log in at the screen once and run hafs-node install there")
        return UNATTENDED

    def uninstall(self, name: str) -> bool:
        path = self._path(name)
        if not path.exists():
            return False
        self._bootout(name)
        path.unlink()
        return True

    def status(self, name: str) -> ServiceStatus:
        if not self._path(name).exists():
            return ServiceStatus(False, False, "not installed", "hafs-node install")
        running = any("state = running" in self._run(["launchctl", "print", target]).stdout for target in self._targets(name))
        detail = f"{PREFIX}{name} is {'running' if running else 'not running'}"
        return ServiceStatus(True, running, detail, "" if running else "hafs-node install starts it anew")

    def command(self, name: str) -> str:
        path = self._path(name)
        return " ".join(plistlib.loads(path.read_bytes())["ProgramArguments"]) if path.exists() else ""

    def _bootout(self, name: str) -> None:
        for target in self._targets(name):
            self._run(["launchctl", "bootout", target])  # not loaded there: nothing to do

    def _targets(self, name: str) -> list[str]:
        return [f"{domain}/{self._uid}/{PREFIX}{name}" for domain in ("gui", "user")]

    def _path(self, name: str) -> Path:
        return self._folder / f"{PREFIX}{name}.plist"
