"""Processes by identity, never by pid alone; a job's processes are found even after their parent has died.

POSIX: a runner leads a session of its own, and every process of the job stays in it. The kernel does not give a pid out again
while a session still bears it, so the session of a dead runner can be found and killed. What starts its own session
(the model server) is deliberately no part of the job.
Windows: the runner puts itself into a Job Object, and the kernel ends the whole job with the runner.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Protocol

from config.errors import NodeError, translate_os_errors
from config.faults import around


class Child(Protocol):
    """A process that this one started; `poll` reaps it and gives its exit code, None while it runs."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


class Processes:
    """What the daemon does to processes; a test that needs none of the real ones puts another in its place."""

    def start_detached(self, argv: Sequence[str], *, cwd: Path, log: Path) -> Child:
        return start_detached(argv, cwd=cwd, log=log)

    def alive(self, process: "ProcessId") -> bool:
        return alive(process)

    def kill_tree(self, leader: "ProcessId") -> None:
        kill_tree(leader)


@dataclass(frozen=True)
class ProcessId:
    """`create_time` in seconds: since the boot on Linux (exact, no clock involved), since the epoch elsewhere."""

    pid: int
    create_time: float
    boot_id: str


@cache
def boot_id() -> str:
    """Names this boot on Linux; elsewhere empty, where the create time alone tells boots apart.

    HAFS_BOOT_ID is for tests: another value is another boot.
    """
    if "HAFS_BOOT_ID" in os.environ:
        return os.environ["HAFS_BOOT_ID"]
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text(encoding="ascii").strip() if file.exists() else ""


def identify(pid: int) -> ProcessId | None:
    """The living process with that pid; None for none, and for a zombie, which only waits to be reaped."""
    seen = _look(pid)
    return None if seen is None or seen[1] else ProcessId(pid, seen[0], boot_id())


def identify_self() -> ProcessId:
    myself = identify(os.getpid())
    assert myself is not None
    return myself


def alive(process: ProcessId) -> bool:
    return identify(process.pid) == process


def start_detached(argv: Sequence[str], *, cwd: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start a process that outlives this one, its session and its connection; it says what it has to say into `log`.

    Raises:
        StoreError: the log cannot be written, or the program cannot be started.
    """
    with translate_os_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # A first line shows where this start's words begin, and that the disk takes words at all.
            output.write(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC {shlex.join(argv)}\n".encode())
            output.flush()
            with around("process.start"):
                if sys.platform == "win32":
                    # sshd's sessions are job objects that are killed on close: break away from them.
                    flags = (
                        subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_BREAKAWAY_FROM_JOB
                    )
                    return subprocess.Popen(
                        argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, creationflags=flags
                    )
                return subprocess.Popen(
                    argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )


def reap(child: "subprocess.Popen[bytes]") -> None:
    """Leave no zombie of a detached process that ends before this one does."""
    threading.Thread(target=child.wait, name=f"reap {child.pid}", daemon=True).start()


def lead_tree() -> None:
    """Make this process the head of a tree that `kill_tree` finds: a session on POSIX, a Job Object on Windows."""
    if sys.platform == "win32":
        from trainer_node.job_object import enter_job_object

        enter_job_object()
    elif os.getsid(0) != os.getpid():
        os.setsid()


def tree(leader: ProcessId) -> list[ProcessId]:
    """What lives of the tree that `leader` leads or led. Empty after a reboot, and where the leader's pid is someone else's."""
    import psutil

    seen = _look(leader.pid)
    if leader.boot_id != boot_id() or (seen is not None and seen[0] != leader.create_time):
        return []
    if sys.platform == "win32":
        pids = [child.pid for child in psutil.Process(leader.pid).children(recursive=True)] if alive(leader) else []
        candidates = [leader.pid, *pids]
    else:
        candidates = [pid for pid in psutil.pids() if _session(pid) == leader.pid]
    found = [process for process in map(identify, candidates) if process is not None]
    return [process for process in found if process.create_time >= leader.create_time]


def kill_tree(leader: ProcessId, *, deadline_s: float = 10.0) -> None:
    """Kill every process of the tree and return when none is left.

    Raises:
        NodeError: some are still there after `deadline_s`.
    """
    from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_exponential

    def last(state: RetryCallState) -> list[ProcessId]:
        assert state.outcome is not None
        survivors: list[ProcessId] = state.outcome.result()
        return survivors

    def strike() -> list[ProcessId]:
        members = tree(leader)
        for member in members:
            _kill(member.pid)
        return members

    patience = Retrying(
        retry=retry_if_result(bool),
        stop=stop_after_delay(deadline_s),
        wait=wait_exponential(multiplier=0.01, max=0.5),
        retry_error_callback=last,
    )
    if survivors := patience(strike):
        pids = ", ".join(str(process.pid) for process in survivors)
        raise NodeError(
            f"processes {pids} do not end", hint="a driver may hold them; look at them with ps, or restart the machine"
        )


def describe_exit(code: int) -> str:
    """`was killed by SIGKILL` or `ended with exit code 3`. A negative code is a signal's number."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}"


def _look(pid: int) -> tuple[float, bool] | None:
    """Create time, and whether it is a zombie; None if there is no such process."""
    if sys.platform == "linux":
        try:
            # The name in brackets may hold anything, brackets too: split behind the last one.
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return int(fields[19]) / os.sysconf("SC_CLK_TCK"), fields[0] in (b"Z", b"X")
    import psutil

    try:
        process = psutil.Process(pid)
        return process.create_time(), process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None


def _session(pid: int) -> int | None:
    if sys.platform == "win32":
        return None
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):  # gone, or another user's: not ours in either case
        return None


def _kill(pid: int) -> None:
    import psutil

    try:
        with around("process.kill"):
            psutil.Process(pid).kill()
    except psutil.NoSuchProcess:
        return
