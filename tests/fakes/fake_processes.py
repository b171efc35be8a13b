"""Runners that are no processes. When they are told to, they do with folder, locks and lease what real ones do."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.contracts.job import STAGES, JobError, JobResult
from config.errors import LeaseLost
from config.locks import FileLock
from trainer_node.jobdir import STOPPED, TRY_AGAIN, Exit, JobDir, RunnerRecord, Stage
from trainer_node.leases import device_lock
from trainer_node.processes import Processes, ProcessId
from trainer_node.train.checkpoints import seal


@dataclass
class FakeRunner:
    pid: int
    folder: JobDir
    attempt: int
    device: str
    boot: str
    code: int | None = None
    begun: bool = False
    locks: list[FileLock] = field(default_factory=list)

    def poll(self) -> int | None:
        return self.code

    def begin(self) -> None:
        """Take the locks and say who it is; what comes too late leaves."""
        for lock in (FileLock(self.folder.path / "runner.lock"), FileLock(device_lock(self.folder.root, self.device))):
            if not lock.acquire(0.0):
                return self.die()
            self.locks.append(lock)
        record = RunnerRecord(
            pid=self.pid,
            create_time=0,
            boot_id=self.boot,
            attempt=self.attempt,
            fence=self.folder.fence,
            heartbeat_at=time.time(),
        )
        try:
            self.folder.write_runner(record)
        except LeaseLost:
            return self.die()
        self.begun = True

    def stage(self, number: int) -> None:
        self._write(lambda: self.folder.write_stage(self.attempt, Stage(state=STAGES[number], detail=f"stage {number}")))

    def checkpoint(self, step: int, whole: bool) -> None:
        checkpoint = self.folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter.bin").write_bytes(b"x")
        if whole:
            seal(checkpoint)

    def end(self, how: str) -> None:
        """Say how it ended. Something of it still lives, until it is killed."""
        error = JobError(code="JobFailed", message=how)
        exits = {
            "success": Exit(code=0),
            "failure": Exit(code=42, error=error),
            "passing": Exit(code=TRY_AGAIN, error=error),
            "stopped": Exit(code=STOPPED, stopped=True),
        }
        if how == "success":
            self._write(lambda: self.folder.write_result(JobResult(model="tiny:v1")))
        self._write(lambda: self.folder.write_exit(self.attempt, exits[how]))

    def die(self) -> None:
        self.code = -9 if self.code is None else self.code
        for lock in self.locks:
            lock.release()

    def _write(self, write: Callable[[], None]) -> None:
        if self.code is None:
            try:
                write()
            except LeaseLost:
                self.die()


class FakeProcesses(Processes):
    def __init__(self) -> None:
        self.boot = "boot 1"
        self.runners: list[FakeRunner] = []

    def start_detached(self, argv: Sequence[str], *, cwd: Path, log: Path) -> FakeRunner:
        words = {word: argv[number + 1] for number, word in enumerate(argv[:-1]) if word.startswith("--")}
        folder = JobDir(Path(words["--job"]), int(words["--fence"]))
        runner = FakeRunner(1000 + len(self.runners), folder, int(words["--attempt"]), words["--device"], self.boot)
        self.runners.append(runner)
        return runner

    def living(self) -> list[FakeRunner]:
        return [runner for runner in self.runners if runner.code is None]

    def alive(self, process: ProcessId) -> bool:
        return any((r.pid, r.boot) == (process.pid, process.boot_id) for r in self.living())

    def kill_tree(self, leader: ProcessId) -> None:
        for runner in self.living():
            if (runner.pid, runner.boot) == (leader.pid, leader.boot_id):
                runner.die()

    def reboot(self) -> None:
        for runner in self.living():
            runner.die()
        self.boot = f"boot {int(self.boot.split()[1]) + 1}"
