"""The folder of a job: the one place where daemon, runner and pipeline meet.

    jobs/<id>/job.json            the TrainJob; written by rpc before the job is queued
    jobs/<id>/base.json           the commit of a base from the hub: every attempt takes the same
    jobs/<id>/start.json          the version that a dpo job goes on from: every attempt the same
    jobs/<id>/server              exists: an Ollama has answered this job, which no other server replaces
    jobs/<id>/stop                exists: stop at the next step, keep the checkpoint
    jobs/<id>/metrics.jsonl       one Metrics a line
    jobs/<id>/checkpoints/        checkpoint-N/, whole ones marked by COMPLETE.json
    jobs/<id>/adapter/            the trained PEFT adapter, marked by COMPLETE.json
    jobs/<id>/adapter.gguf, gguf/, merged/    the forms that were made of it
    jobs/<id>/{plan,training_stats,evaluation,probes,export,result}.json
    jobs/<id>/attempts/<n>/log.txt        everything the pipeline printed, byte for byte
    jobs/<id>/attempts/<n>/runner.json    who runs it: written by the runner, again every five seconds
    jobs/<id>/attempts/<n>/stage.json     where it is: written by the pipeline
    jobs/<id>/attempts/<n>/error.json     why it failed: written by the pipeline
    jobs/<id>/attempts/<n>/exit.json      how it ended: written last, by the runner

Of the database the pipeline asks one thing, whether its lease still holds; the daemon never reads tensors. JSON files are
replaced whole. What belongs to an attempt that was given up writes nothing here any more.
"""

import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from config.contracts.base import Tolerant
from config.contracts.job import JobError, JobResult, JobState, TrainJob
from config.errors import LeaseLost, translate_os_errors
from config.faults import around
from config.files import sync_folder, write_atomic
from trainer_node.queue import Queue

STOPPED = 75  # exit code of a pipeline that honoured the stop file
ORPHAN_S = 3600.0  # a submit takes no longer
TRY_AGAIN = 76  # exit code of a pipeline that met what may pass: no model server, a full disk

M = TypeVar("M", bound=Tolerant)


class RunnerRecord(Tolerant):
    """Identity of a process (a pid alone may have been reused), and when it last said that it lives (Unix seconds)."""

    pid: int
    create_time: float
    boot_id: str
    attempt: int
    fence: int = 0
    heartbeat_at: float = 0.0


class BasePin(Tolerant):
    """The base by its full name, hf:OWNER/REPO@COMMIT/FILE.gguf."""

    base: str


class Stage(Tolerant):
    state: JobState
    detail: str = ""


class Exit(Tolerant):
    """How an attempt ended. `stopped`: the stop file was honoured. With the code TRY_AGAIN, `error` may pass."""

    code: int
    error: JobError | None = None
    stopped: bool = False


class JobDir:
    """`fence` is that of the lease under which the attempt was started; 0: no attempt's, or one started by hand."""

    def __init__(self, path: Path, fence: int = 0) -> None:
        self.path = path
        self.fence = fence
        self.job_file = path / "job.json"
        self.base_file = path / "base.json"
        self.stop_file = path / "stop"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.adapter_gguf = path / "adapter.gguf"
        self.result_file = path / "result.json"

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def root(self) -> Path:
        """The node's root: <root>/jobs/<id>."""
        return self.path.parent.parent

    def attempt(self, number: int) -> Path:
        return self.path / "attempts" / str(number)

    def log_file(self, attempt: int) -> Path:
        return self.attempt(attempt) / "log.txt"

    def job(self) -> TrainJob:
        return TrainJob.model_validate_json(self.job_file.read_bytes())

    def result(self) -> JobResult | None:
        return _read(self.result_file, JobResult)

    def base(self) -> str:
        """The pinned name of the base; "" while it is not known, and for one that is not from the hub."""
        pin = _read(self.base_file, BasePin)
        return pin.base if pin else ""

    def runner(self, attempt: int) -> RunnerRecord | None:
        return _read(self.attempt(attempt) / "runner.json", RunnerRecord)

    def stage(self, attempt: int) -> Stage | None:
        return _read(self.attempt(attempt) / "stage.json", Stage)

    def exit(self, attempt: int) -> Exit | None:
        return _read(self.attempt(attempt) / "exit.json", Exit)

    def write_job(self, job: TrainJob) -> None:
        with around("job.write"):
            write_atomic(self.job_file, job.model_dump_json(indent=1).encode())
            sync_folder(self.path.parent)

    def require_lease(self) -> None:
        """Raises LeaseLost where the daemon has given up the attempt that this process belongs to."""
        if self.fence:
            with closing(Queue(self.root)) as queue:
                lease = queue.lease(self.id)
            if lease is None or lease.fence != self.fence:
                hint = "nothing to do: what is left of it ends, and another attempt goes on"
                raise LeaseLost(f"this attempt of {self.id} was given up: its lease has ended", hint=hint)

    def write_result(self, result: JobResult) -> None:
        """Raises LeaseLost; so do those below."""
        self.require_lease()
        with around("result.write"):
            write_atomic(self.result_file, result.model_dump_json(indent=1).encode())

    def write_base(self, base: str) -> None:
        self.require_lease()
        with around("base.write"):
            write_atomic(self.base_file, BasePin(base=base).model_dump_json().encode())

    def write_runner(self, record: RunnerRecord) -> None:
        self.require_lease()
        with around("runner.write"):
            write_atomic(self.attempt(record.attempt) / "runner.json", record.model_dump_json().encode())

    def write_stage(self, attempt: int, stage: Stage) -> None:
        self.require_lease()
        with around("stage.write"):
            write_atomic(self.attempt(attempt) / "stage.json", stage.model_dump_json().encode())

    def write_exit(self, attempt: int, exit_: Exit) -> None:
        self.require_lease()
        with around("exit.write"):
            write_atomic(self.attempt(attempt) / "exit.json", exit_.model_dump_json().encode())


def clear_orphans(root: Path, queue: Queue) -> list[str]:
    """Remove the folders of submits that were killed before their job had a row; their names.

    Only a folder that holds nothing but job.json, for an hour now: what was ever worked on stays, row or not. Raises StoreError.
    """
    known = {job.id for job in queue.all()}
    with translate_os_errors(root):
        aged = [path for path in (root / "jobs").glob("*") if path.is_dir() and path.stat().st_mtime < time.time() - ORPHAN_S]
        orphans = [path for path in aged if path.name not in known and all(map(_of_a_submit, path.iterdir()))]
        for orphan in orphans:
            with around("orphan.remove"):
                shutil.rmtree(orphan)
    return [orphan.name for orphan in orphans]


def _of_a_submit(path: Path) -> bool:
    """job.json, or what was to become it."""
    return path.name.startswith(("job.json", ".job.json."))


def _read(path: Path, model: type[M]) -> M | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
