"""A pipeline that does what the job's `system` text says: a JSON object, attempt number → list of steps. Run by its path.

stage STATE | print TEXT | checkpoint N | await FILE (in the job's folder) | hang (until the stop file) | stubborn (with a child,
both deaf to signals) | fail CODE MESSAGE | exit N | kill (itself, with SIGKILL) | succeed
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
from trainer_node.jobdir import JobDir, Stage
from trainer_node.train.checkpoints import seal


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def stubborn(folder: JobDir) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN)\nwhile True: signal.pause()"]
    )
    (folder.path / "child.pid").write_text(str(child.pid))
    while True:
        signal.pause()


def take(folder: JobDir, attempt: int, word: str, rest: str) -> None:
    if word == "stage":
        folder.write_stage(attempt, Stage(state=JobState(rest), detail=f"{rest.lower()}…"))
    elif word == "print":
        sys.stdout.write(rest + "\n")
        sys.stdout.flush()
    elif word == "checkpoint":
        checkpoint = folder.checkpoints / f"checkpoint-{rest}"
        checkpoint.mkdir(parents=True)
        seal(checkpoint)
    elif word == "await":
        wait_for(folder.path / rest)
    elif word == "stubborn":
        stubborn(folder)
    elif word == "succeed":
        folder.write_result(JobResult(model="tiny:v1", steps=7))
    else:
        leave(folder, attempt, word, rest)


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
    args = parser.parse_args()
    folder = JobDir(args.job)
    (folder.attempt(args.attempt) / "pipeline.pid").write_text(str(os.getpid()))
    for step in json.loads(folder.job().spec.system)[str(args.attempt)]:
        word, _, rest = step.partition(" ")
        take(folder, args.attempt, word, rest)


if __name__ == "__main__":
    main()
