"""A systemd user unit. It lives in the user's own folder and needs no rights; to outlive the last log-out it needs lingering."""

import getpass
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from config.files import write_atomic
from trainer_node.service.base import Definition, Run, ServiceStatus, require, run

HINT = "look at: systemctl --user status"


def unit_text(definition: Definition) -> str:
    """The unit file. KillMode=process: a stop ends the daemon, never the job that it watches."""
    lines = [
        "[Unit]",
        f"Description=hafs trainer node {_escaped(str(definition.root))}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "ExecStart=:" + " ".join(_quoted(word) for word in definition.argv),  # the colon: $ is no variable
        *("Environment=" + _quoted(f"{key}={value}") for key, value in sorted(definition.environment.items())),
        "Restart=always",
        "RestartSec=15",
        "KillMode=process",
        "OOMPolicy=continue",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


class Systemd:
    kind = "systemd user unit"

    def __init__(self, run: Run = run, folder: Path | None = None) -> None:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        self._run, self._folder = run, folder or config / "systemd" / "user"
        _find_bus()

    def works(self) -> bool:
        """Whether a user manager answers: containers and bare log-ins have none."""
        return shutil.which("systemctl") is not None and self._systemctl("show-environment").returncode == 0

    def install(self, definition: Definition) -> str:
        unit = f"{definition.name}.service"
        write_atomic(self._folder / unit, unit_text(definition).encode())
        require(self._systemctl("daemon-reload"), "systemd does not read its units", HINT)
        require(self._systemctl("enable", unit), f"systemd does not enable {unit}", HINT)
        require(self._systemctl("restart", unit), f"systemd does not start {unit}", f"{HINT} {unit}")
        return self._linger()

    def uninstall(self, name: str) -> bool:
        path = self._folder / f"{name}.service"
        if not path.exists():
            return False
        require(self._systemctl("disable", "--now", path.name), f"systemd does not stop {path.name}", HINT)
        path.unlink()
        require(self._systemctl("daemon-reload"), "systemd does not read its units", HINT)
        return True

    def status(self, name: str) -> ServiceStatus:
        if not (self._folder / f"{name}.service").exists():
            return ServiceStatus(False, False, "not installed", "hafs-node install")
        state = self._systemctl("is-active", f"{name}.service").stdout.strip() or "unknown"
        hint = "" if state == "active" else f"journalctl --user -u {name} says why; hafs-node install starts it anew"
        return ServiceStatus(True, state == "active", f"{name}.service is {state}", hint or self._linger(ask=False))

    def command(self, name: str) -> str:
        path = self._folder / f"{name}.service"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = next((line.removeprefix("ExecStart=:") for line in lines if line.startswith("ExecStart=")), "")
        return " ".join(shlex.split(found)).replace("%%", "%")  # as `_quoted` wrote it

    def _linger(self, *, ask: bool = True) -> str:
        """Ask for lingering, or only look. Returns the line to run where it is off."""
        user = getpass.getuser()
        if ask:
            self._run(["loginctl", "enable-linger", user])  # refused for some users: the next line finds out
        shown = self._run(["loginctl", "show-user", user, "--property=Linger"])
        off = shown.stdout.strip() != "Linger=yes"
        return f"to keep it running when nobody is logged in: sudo loginctl enable-linger {user}" if off else ""

    def _systemctl(self, *words: str) -> "subprocess.CompletedProcess[str]":
        argv: Sequence[str] = ["systemctl", "--user", "--no-pager", *words]
        return self._run(argv)


def _find_bus() -> None:
    """A session without PAM (sshd with UsePAM no) is not told where the user's manager listens."""
    if os.name == "posix" and not os.environ.get("XDG_RUNTIME_DIR"):
        folder = f"/run/user/{os.getuid()}"
        if Path(folder).is_dir():
            os.environ["XDG_RUNTIME_DIR"] = folder


def _quoted(word: str) -> str:
    """One word of a unit file: systemd undoes quotes, backslashes and its % specifiers."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _escaped(text: str) -> str:
    return text.replace("%", "%%").replace("\n", " ")
