"""A real OpenSSH server of the test's own, and a relay that cuts or stalls a connection after so many bytes.

Keys, configuration and log lie in one folder; it listens on a free port of 127.0.0.1, unless told otherwise, and lets in the user
who runs the test.
"""

import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


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


class Relay:
    """Passes connections on to `target`, the first one with a fault.

    It ends after `cut_after` bytes towards the target or `cut_back_after` bytes from it, or goes silent after `stall_after`.
    """

    def __init__(self, target: int, *, cut_after: int = 0, cut_back_after: int = 0, stall_after: int = 0) -> None:
        self._target = target
        self._cut_after, self._cut_back_after, self._stall_after = cut_after, cut_back_after, stall_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.passed = 0  # bytes towards the target, over all connections
        self._stalled = threading.Event()
        self._open: list[socket.socket] = []
        self._silenced: set[socket.socket] = set()
        self._ending: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            _end(sock)
        for thread in self._threads:
            thread.join(10)
        for sock in self._open:
            sock.close()

    def cut(self) -> None:
        """End every connection that is open now."""
        for sock in list(self._open):
            _end(sock)

    def cut_at_answer(self) -> None:
        """End the connections that are open now as soon as something comes back over them; it gets lost."""
        self._ending.update(sock for sock in self._open if sock.getpeername()[1] == self._target)

    def stall(self) -> None:
        """Nothing passes any more over the connections that are open now, and none is closed."""
        self._silenced.update(self._open)

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed: the test is over
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            self.connections += 1
            faulty = self.connections == 1
            self._start(self._pump, near, far, self._cut_after if faulty else 0, self._stall_after if faulty else 0)
            self._start(self._pump, far, near, self._cut_back_after if faulty else 0, 0)

    def _pump(self, source: socket.socket, target: socket.socket, cut_after: int, stall_after: int) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                passed += len(data)
                if target.getpeername()[1] == self._target:
                    self.passed += len(data)
                if stall_after and passed >= stall_after:
                    self._stalled.set()
                    return  # neither end is closed
                if source in self._silenced:
                    return
                if source in self._ending or (cut_after and passed >= cut_after):
                    break
                target.sendall(data)
        except OSError:  # the other direction has ended it
            return
        finally:
            if not self._stalled.is_set() and source not in self._silenced:
                _end(source)
                _end(target)


def _end(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # already ended
        return
