"""The folder of a job: the one place where daemon, runner and pipeline meet.

    jobs/<id>/job.json            the TrainJob; written by rpc before the job is queued
    jobs/<id>/stop                exists: stop at the next step, keep the checkpoint
    jobs/<id>/metrics.jsonl       one Metrics a line
    jobs/<id>/checkpoints/        checkpoint-N/, whole ones marked by COMPLETE.json
    jobs/<id>/adapter/            the trained PEFT adapter, marked by COMPLETE.json
    jobs/<id>/adapter.gguf
    jobs/<id>/{plan,training_stats,evaluation,result}.json
    jobs/<id>/attempts/<n>/log.txt        everything the pipeline printed, byte for byte
    jobs/<id>/attempts/<n>/runner.json    who runs it: written by the runner
    jobs/<id>/attempts/<n>/stage.json     where it is: written by the pipeline
    jobs/<id>/attempts/<n>/error.json     why it failed: written by the pipeline
    jobs/<id>/attempts/<n>/exit.json      how it ended: written last, by the runner

The pipeline never touches the database; the daemon never reads tensors. JSON files are replaced whole.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from config.contracts.base import Tolerant
from config.contracts.job import JobError, JobResult, JobState, TrainJob
from config.files import write_atomic

STOPPED = 75  # exit code of a pipeline that honoured the stop file
TRY_AGAIN = 76  # exit code of a pipeline that met what may pass: no model server, a full disk

M = TypeVar("M", bound=Tolerant)


class RunnerRecord(Tolerant):
    """Identity of a process: a pid alone may have been reused."""

    pid: int
    create_time: float
    boot_id: str
    attempt: int


class Stage(Tolerant):
    state: JobState
    detail: str = ""


class Exit(Tolerant):
    """How an attempt ended. `stopped`: the stop file was honoured. With the code TRY_AGAIN, `error` may pass."""

    code: int
    error: JobError | None = None
    stopped: bool = False


class JobDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.job_file = path / "job.json"
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

    def runner(self, attempt: int) -> RunnerRecord | None:
        return _read(self.attempt(attempt) / "runner.json", RunnerRecord)

    def stage(self, attempt: int) -> Stage | None:
        return _read(self.attempt(attempt) / "stage.json", Stage)

    def exit(self, attempt: int) -> Exit | None:
        return _read(self.attempt(attempt) / "exit.json", Exit)

    def write_job(self, job: TrainJob) -> None:
        write_atomic(self.job_file, job.model_dump_json(indent=1).encode())

    def write_result(self, result: JobResult) -> None:
        write_atomic(self.result_file, result.model_dump_json(indent=1).encode())

    def write_runner(self, record: RunnerRecord) -> None:
        write_atomic(self.attempt(record.attempt) / "runner.json", record.model_dump_json().encode())

    def write_stage(self, attempt: int, stage: Stage) -> None:
        write_atomic(self.attempt(attempt) / "stage.json", stage.model_dump_json().encode())

    def write_exit(self, attempt: int, exit_: Exit) -> None:
        write_atomic(self.attempt(attempt) / "exit.json", exit_.model_dump_json().encode())


def _read(path: Path, model: type[M]) -> M | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
