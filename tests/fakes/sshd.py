"""A real OpenSSH server of the test's own, and a relay that cuts or stalls a connection after so many bytes.

Keys, configuration and log lie in one folder; it listens on a free port of 127.0.0.1, unless told otherwise, and lets in the user
who runs the test.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.ports import free_port

START_S = 15.0


class PrivateSshd:
    """A context manager; `identity` is the private key file that logs in, `environment` what its sessions are given."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.environment = environment
        self.folder = folder
        self.user = getpass.getuser()
        self.port = free_port()
        self.address = "127.0.0.1"
        self.within: list[str] = []  # what has to stand before its command line
        self.identity = folder / "user"
        self.host_key = folder / "host"
        self.more = ""  # lines of its configuration, from the next start on
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in (self.identity, self.host_key):
            make_key(key)
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the same port each time."""
        config = self.folder / "sshd_config"
        config.write_text(sshd_config(self.folder, self.address, self.port, self.environment) + self.more)
        if os.geteuid() == 0:  # the separated process of a root sshd wants its empty folder
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        argv = [*self.within, sshd_path(), "-D", "-e", "-f", str(config)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for_port(self.address, self.port, self._process, self.folder / "log")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)

    def logins(self) -> int:
        """How often somebody logged in so far."""
        return (self.folder / "log").read_text(errors="replace").count("Accepted publickey")

    def new_host_key(self) -> None:
        """Begin again with another host key, as a reinstalled machine does."""
        self.stop()
        self.host_key.unlink()
        make_key(self.host_key)
        self.start()


def sshd_path() -> str:
    """sshd must be started by its absolute path."""
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError("sshd")
    return found


def sshd_config(folder: Path, address: str, port: int, environment: dict[str, str]) -> str:
    lines = [
        f"Port {port}",
        f"ListenAddress {address}",
        f"HostKey {folder}/host",
        f"AuthorizedKeysFile {folder}/user.pub",
        "PidFile none",
        "UsePAM no",
        "StrictModes no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "AllowTcpForwarding yes",
        "Subsystem sftp internal-sftp",
    ]
    if environment:
        lines.append("SetEnv " + " ".join(f'"{key}={value}"' for key, value in environment.items()))
    return "\n".join(lines) + "\n"


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)


def wait_for_port(address: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until something answers there. Raises RuntimeError with the log where the process ends or the deadline passes."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}: {log.read_text(errors='replace')[-2000:]}")


def write_ssh(folder: Path, config: str) -> str:
    """An `ssh` in `folder` that reads this configuration alone (ssh itself takes no home folder from the environment).

    Returns the PATH that finds it.
    """
    (folder / "config").write_text(config)
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "ssh").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
