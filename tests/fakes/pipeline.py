"""A pipeline that does what the job's `system` text says: a JSON object, attempt number (or `*`) → list of steps. Run by path.

stage STATE | pin NAME (of a base) | print TEXT | checkpoint N | grow (the next checkpoint) | once NAME STEP (not again for this
job) | hang (until the stop file) | await FILE (in the job's folder) | stubborn (with a child, both deaf to signals) |
fail CODE MESSAGE | exit N | kill (itself, with SIGKILL) | succeed

It leaves steps.txt, the checkpoints as they came, and a file `overlap` if another one was at work on the same job.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from config.contracts.job import JobError, JobResult, JobState
from config.files import write_atomic
from config.locks import FileLock
from trainer_node.jobdir import JobDir, Stage
from trainer_node.train.checkpoints import newest_complete, remove_after, seal, step_of


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def stubborn(folder: JobDir) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN)\nwhile True: signal.pause()"]
    )
    write_atomic(folder.path / "child.pid", str(child.pid).encode())
    while True:
        signal.pause()


def save(folder: JobDir, step: int) -> None:
    checkpoint = folder.checkpoints / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter.bin").write_bytes(b"%d" % step)
    seal(checkpoint)
    with (folder.path / "steps.txt").open("a") as steps:
        steps.write(f"{step}\n")


def take(folder: JobDir, attempt: int, step: str) -> None:
    word, _, rest = step.partition(" ")
    if word == "once":
        name, _, step = rest.partition(" ")
        if not (folder.path / name).exists():
            (folder.path / name).touch()
            take(folder, attempt, step)
    elif word == "grow":
        newest = step_of(newest_complete(folder.checkpoints))
        remove_after(folder.checkpoints, newest)
        save(folder, newest + 1)
    elif word in ("stage", "pin"):
        note(folder, attempt, word, rest)
    elif word == "print":
        sys.stdout.write(rest + "\n")
        sys.stdout.flush()
    elif word == "checkpoint":
        save(folder, int(rest))
    elif word == "await":
        wait_for(folder.path / rest)
    elif word == "stubborn":
        stubborn(folder)
    elif word == "succeed":
        folder.write_result(JobResult(model="tiny:v1", steps=7))
    else:
        leave(folder, attempt, word, rest)


def note(folder: JobDir, attempt: int, word: str, rest: str) -> None:
    if word == "pin":
        folder.write_base(rest)
    else:
        folder.write_stage(attempt, Stage(state=JobState(rest), detail=f"{rest.lower()}…"))


def leave(folder: JobDir, attempt: int, word: str, rest: str) -> None:
    if word == "hang":
        wait_for(folder.stop_file)
        sys.exit(75)
    if word == "fail":
        code, _, message = rest.partition(" ")
        error = JobError(code=code, message=message)
        (folder.attempt(attempt) / "error.json").write_text(error.model_dump_json())
        sys.exit(1)
    if word == "exit":
        sys.exit(int(rest))
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(f"unknown step {word}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--fence", type=int)
    args = parser.parse_args()
    folder = JobDir(args.job, args.fence)
    write_atomic(folder.attempt(args.attempt) / "pipeline.pid", str(os.getpid()).encode())
    alone = FileLock(folder.path / "alone.lock")
    if not alone.acquire(0):
        (folder.path / "overlap").touch()
    steps = json.loads(folder.job().spec.system)
    for step in steps[str(args.attempt) if str(args.attempt) in steps else "*"]:
        take(folder, args.attempt, step)


if __name__ == "__main__":
    main()
