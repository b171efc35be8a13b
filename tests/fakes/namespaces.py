"""Network namespaces joined to this one by a cable: machines with interfaces of their own, without being machines.

Needs root and a kernel that has them; a test that is refused one is skipped with the reason. Addresses are of the range for
benchmarks (RFC 2544), names and addresses those of this process, so that two runs do not meet.
"""

import os
import signal
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.fakes.sshd import PrivateSshd


class Namespace:
    """A context manager. `number` (0 to 63) tells those of one process apart."""

    def __init__(self, number: int) -> None:
        self.name = f"hafs{os.getpid() % 100_000}-{number}"
        self._cable = self.name.replace("hafs", "h")  # a name of at most 15 characters
        base = f"198.18.{os.getpid() % 250}.{4 * number}"
        prefix, last = base.rsplit(".", 1)
        self.near, self.address = f"{prefix}.{int(last) + 1}", f"{prefix}.{int(last) + 2}"
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        made = subprocess.run(["ip", "netns", "add", self.name], capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"needs network namespaces: {made.stderr.strip()}")
        self._undo.callback(ip, "netns", "delete", self.name)
        try:
            ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            self._undo.callback(ip, "link", "delete", self._cable)  # a namespace goes some time after its last process
            ip("addr", "add", f"{self.near}/30", "dev", self._cable)
            ip("link", "set", self._cable, "up")
            for words in (f"addr add {self.address}/30 dev eth0", "link set eth0 up", "link set lo up"):
                ip("-n", self.name, *words.split())
        except BaseException:
            self._undo.close()
            raise
        self._undo.callback(self._end_all)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def _end_all(self) -> None:
        """End what runs there: sessions whose cable was pulled out would wait for hours for their client."""
        for pid in subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def inside(self, *argv: str) -> list[str]:
        """The command line that runs `argv` there."""
        return ["ip", "netns", "exec", self.name, *argv]

    def sshd(self, folder: Path) -> PrivateSshd:
        """One that listens there."""
        server = PrivateSshd(folder)
        server.address, server.within = self.address, self.inside()
        return server

    def slow_down(self, rate: str) -> None:
        """What comes from here is limited to a rate as `tc` writes it."""
        subprocess.run(
            ["tc", "qdisc", "add", "dev", self._cable, *f"root tbf rate {rate} burst 64kb latency 50ms".split()], check=True
        )

    def pull(self) -> None:
        """Pull the cable out at the far end."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Put it in again."""
        ip("-n", self.name, "link", "set", "eth0", "up")

    def listening(self) -> list[str]:
        """Local address and program of all that listens there on TCP."""
        shown = subprocess.run(self.inside("ss", "-Hlntp"), capture_output=True, text=True, check=True).stdout
        return [" ".join(line.split()[3:4] + line.split()[5:6]) for line in shown.splitlines()]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
