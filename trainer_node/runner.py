"""Runs one attempt of a job. It leads the session of everything the job starts, and writes exit.json last, whole, once.

No exit.json and no living runner means: cut off (by a reboot, or by kill -9 of the runner itself).
One runner at a time in a job's folder: it holds runner.lock before it says who it is.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from config.contracts.job import JobError
from config.errors import JobFailed, StoreHeld
from config.locks import FileLock
from trainer_node.jobdir import STOPPED, Exit, JobDir, RunnerRecord
from trainer_node.processes import describe_exit, identify_self, lead_tree

PIPELINE = (sys.executable, "-P", "-m", "trainer_node.pipeline")
TAIL_LINES, TAIL_BYTES = 8, 4096


def runner_argv(folder: JobDir, attempt: int, pipeline: Sequence[str]) -> list[str]:
    own = [sys.executable, "-P", "-m", "trainer_node.runner"]
    return [*own, "--job", str(folder.path), "--attempt", str(attempt), "--", *pipeline]


def run(folder: JobDir, attempt: int, pipeline: Sequence[str] = PIPELINE) -> Exit:
    """Run the pipeline to its end; the Exit returned is also in exit.json.

    Raises:
        StoreHeld: another runner works in this folder; nothing was started or written.
        StoreError: the attempt's folder cannot be written.
    """
    lock = FileLock(folder.path / "runner.lock")
    if not lock.acquire():
        raise StoreHeld(f"another runner works on {folder.id}", hint="hafs-node doctor shows who; nothing was started")
    folder.write_runner(_record(attempt))
    try:
        code = _run_pipeline(folder, attempt, pipeline)
        exit_ = exit_of(folder, attempt, code)
    except OSError as error:
        exit_ = Exit(code=1, error=JobError(code=JobFailed.__name__, message=f"cannot start the pipeline: {error}"))
    folder.write_exit(attempt, exit_)
    lock.release()
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


def _run_pipeline(folder: JobDir, attempt: int, pipeline: Sequence[str]) -> int:
    argv = [*pipeline, "--job", str(folder.path), "--attempt", str(attempt)]
    with folder.log_file(attempt).open("ab") as log:
        child = subprocess.Popen(argv, cwd=folder.path, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child.wait()


def _record(attempt: int) -> RunnerRecord:
    me = identify_self()
    return RunnerRecord(pid=me.pid, create_time=me.create_time, boot_id=me.boot_id, attempt=attempt)


def _error_file(folder: JobDir, attempt: int) -> JobError | None:
    try:
        return JobError.model_validate_json((folder.attempt(attempt) / "error.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainer_node.runner")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("pipeline", nargs="*", default=list(PIPELINE))
    args = parser.parse_args()
    lead_tree()
    run(JobDir(args.job.resolve()), args.attempt, args.pipeline)


if __name__ == "__main__":
    main()
