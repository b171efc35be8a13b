"""Runs one attempt of a job. It leads the session of everything the job starts, and writes exit.json last, whole, once.

No exit.json and no living runner means: cut off (by a reboot, or by kill -9 of the runner itself).
One runner at a time in a job's folder and on a device: it holds runner.lock and the device's lock before it says who it is,
and one that comes too late, after its attempt was given up, starts nothing. The device's lock goes on to the pipeline, so it is
free only when the last process of the attempt is gone. Every five seconds the runner says that it lives.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from config.contracts.job import JobError
from config.errors import JobFailed, LeaseLost, StoreError, StoreHeld
from config.faults import around
from config.locks import FileLock
from trainer_node.jobdir import STOPPED, Exit, JobDir, RunnerRecord
from trainer_node.leases import CPU, device_lock, environment
from trainer_node.periodic import every
from trainer_node.processes import describe_exit, identify_self, lead_tree

PIPELINE = (sys.executable, "-P", "-m", "trainer_node.pipeline")
TAIL_LINES, TAIL_BYTES = 8, 4096
HEARTBEAT_S = 5.0
DEVICE_WAIT_S = 10.0  # the last process of the attempt before may still be on its way out

log = logging.getLogger("trainer_node.runner")


def runner_argv(folder: JobDir, attempt: int, device: str, pipeline: Sequence[str]) -> list[str]:
    """The command line of the runner of an attempt; `folder` carries the fence."""
    own = [sys.executable, "-P", "-m", "trainer_node.runner"]
    lease = ["--device", device, "--fence", str(folder.fence)]
    return [*own, "--job", str(folder.path), "--attempt", str(attempt), *lease, "--", *pipeline]


def run(folder: JobDir, attempt: int, device: str = CPU, pipeline: Sequence[str] = PIPELINE) -> Exit:
    """Run the pipeline to its end; the Exit returned is also in exit.json.

    Raises:
        StoreHeld: another runner works in this folder or on this device; nothing was started or written.
        LeaseLost: the attempt was given up, before it began or while it ran.
        StoreError: the attempt's folder cannot be written.
    """
    with ExitStack() as held:
        _hold(held, FileLock(folder.path / "runner.lock"), folder.id)
        on_device = _hold(held, FileLock(device_lock(folder.root, device)), device, DEVICE_WAIT_S)
        on_device.sign()
        record = _record(folder, attempt)
        folder.write_runner(record)
        try:
            with _heartbeat(folder, record):
                code = _run_pipeline(folder, attempt, device, on_device, pipeline)
            exit_ = exit_of(folder, attempt, code)
        except OSError as error:
            exit_ = Exit(code=1, error=JobError(code=JobFailed.__name__, message=f"cannot start the pipeline: {error}"))
        folder.write_exit(attempt, exit_)
        return exit_


def exit_of(folder: JobDir, attempt: int, code: int) -> Exit:
    """How an attempt ended, from the code and what the pipeline left. A bare signal is no error: such an attempt can go on."""
    if code == STOPPED:
        return Exit(code=code, stopped=True)
    if code == 0 and folder.result() is not None:
        return Exit(code=0)
    error = _error_file(folder, attempt)
    if error is None and code >= 0:
        what = "ended without a result" if code == 0 else describe_exit(code)
        error = JobError(code=JobFailed.__name__, message=f"the pipeline {what}", hint=log_tail(folder, attempt))
    return Exit(code=code, error=error)


def log_tail(folder: JobDir, attempt: int) -> str:
    """The last lines of the attempt's log, for an error that has nothing better to say."""
    try:
        with folder.log_file(attempt).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return "its log is empty"
    return "its last lines: " + "\n".join([line.rstrip() for line in lines if line.strip()][-TAIL_LINES:])


def _hold(held: ExitStack, lock: FileLock, what: str, patience_s: float = 0.2) -> FileLock:
    if not lock.acquire(patience_s):
        raise StoreHeld(f"another runner works on {what}", hint="hafs-node doctor shows who; nothing was started")
    held.callback(lock.release)
    return lock


def _run_pipeline(folder: JobDir, attempt: int, device: str, lock: FileLock, pipeline: Sequence[str]) -> int:
    argv = [*pipeline, "--job", str(folder.path), "--attempt", str(attempt), "--fence", str(folder.fence)]
    inherited = () if sys.platform == "win32" else (lock.handle,)  # Windows: the Job Object ends the tree with the runner
    with folder.log_file(attempt).open("ab") as output, around("pipeline.start"):
        child = subprocess.Popen(
            argv,
            cwd=folder.path,
            env={**os.environ, **environment(device)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
        )
    signal.signal(signal.SIGTERM, lambda *_: _terminate(child))
    return child.wait()


def _terminate(child: "subprocess.Popen[bytes]") -> None:
    with around("pipeline.terminate"):
        child.terminate()


def _heartbeat(folder: JobDir, record: RunnerRecord) -> AbstractContextManager[None]:
    """Write the record anew now and then. A disk that takes it not, or a lost lease, ends no training: it is only said."""

    def beat() -> None:
        try:
            folder.write_runner(record.model_copy(update={"heartbeat_at": time.time()}))
        except (StoreError, LeaseLost) as error:
            log.warning("%s: no heartbeat: %s", folder.id, error)

    return every(HEARTBEAT_S, beat, name="heartbeat")


def _record(folder: JobDir, attempt: int) -> RunnerRecord:
    me = identify_self()
    return RunnerRecord(
        pid=me.pid,
        create_time=me.create_time,
        boot_id=me.boot_id,
        attempt=attempt,
        fence=folder.fence,
        heartbeat_at=time.time(),
    )


def _error_file(folder: JobDir, attempt: int) -> JobError | None:
    try:
        return JobError.model_validate_json((folder.attempt(attempt) / "error.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainer_node.runner")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--device", default=CPU)
    parser.add_argument("--fence", type=int, default=0, help="of the lease; 0: started by hand")
    parser.add_argument("pipeline", nargs="*", default=list(PIPELINE))
    args = parser.parse_args()
    lead_tree()
    run(JobDir(args.job.resolve(), args.fence), args.attempt, args.device, args.pipeline)


if __name__ == "__main__":
    main()
