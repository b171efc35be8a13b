"""The frame of the pipeline: what is done is skipped, the stop file is honoured, every failure is written down."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from config.contracts.job import JobError, JobSpec, JobState, TrainJob
from config.errors import DiskFull, GateFailed, HafsError, ProviderUnavailable, StoreHeld
from trainer_node import pipeline
from trainer_node.jobdir import JobDir
from trainer_node.train.checkpoints import seal
from trainer_node.work import Work

Stages = tuple[tuple[JobState, Callable[[Work], bool], Callable[[Work], None]], ...]


@pytest.fixture
def job_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobDir:
    monkeypatch.setattr(pipeline, "ENVIRONMENT", {})  # it is for a process of its own
    found = JobDir(tmp_path / "jobs" / "one")
    spec = JobSpec(kind="sft", name="m", base="missing.gguf", data=["d"])
    found.write_job(TrainJob(spec=spec, dataset_id="0" * 64, code_version="x", nonce="n"))
    return found


def stages(*done: bool, ran: list[JobState], failure: Exception | None = None) -> Stages:
    """Stages that note that they ran; the last one fails with `failure`."""

    def stage(state: JobState, last: bool) -> Callable[[Work], None]:
        def work(_: Work) -> None:
            ran.append(state)
            if last and failure is not None:
                raise failure

        return work

    states = (JobState.PREPARING, JobState.RUNNING, JobState.EVALUATING)
    return tuple(
        (state, lambda _, done=done[number]: done, stage(state, state is states[-1])) for number, state in enumerate(states)
    )


def main(job_dir: JobDir) -> int:
    return pipeline.main(["--job", str(job_dir.path), "--attempt", "1"])


def test_what_is_done_is_skipped_but_told(job_dir: JobDir, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[JobState] = []
    monkeypatch.setattr(pipeline, "STAGES", stages(True, True, False, ran=ran))
    assert main(job_dir) == 0
    assert ran == [JobState.EVALUATING]
    stage = job_dir.stage(1)
    assert stage is not None
    assert (stage.state, stage.detail) == (JobState.EVALUATING, "")


def test_the_stop_file_ends_it_before_the_next_stage(job_dir: JobDir, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[JobState] = []
    monkeypatch.setattr(pipeline, "STAGES", stages(False, False, False, ran=ran))
    job_dir.stop_file.touch()
    assert main(job_dir) == 75
    assert ran == []
    assert not (job_dir.attempt(1) / "error.json").exists()


@pytest.mark.parametrize(
    ("failure", "code", "exit_code"),
    [
        (GateFailed("no", hint="do this"), "GateFailed", 44),
        (ZeroDivisionError("no"), "JobFailed", 42),
        (ProviderUnavailable("no", hint="start it"), "ProviderUnavailable", 76),
        (DiskFull("no", hint="free some"), "DiskFull", 76),
        (StoreHeld("no", hint="wait"), "StoreHeld", 76),
        (OSError(errno.ENOSPC, "no"), "DiskFull", 76),
    ],
)
def test_a_failure_is_written_with_what_to_do(
    job_dir: JobDir, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: str, exit_code: int
) -> None:
    monkeypatch.setattr(pipeline, "STAGES", stages(False, False, False, ran=[], failure=failure))
    assert main(job_dir) == exit_code
    error = JobError.model_validate_json((job_dir.attempt(1) / "error.json").read_bytes())
    assert error.code == code
    assert "no" in error.message
    assert error.hint == (failure.hint if isinstance(failure, HafsError) else error.hint)
    assert error.hint


def test_a_full_disk_is_known_whatever_the_library_says_and_takes_no_error_file(
    job_dir: JobDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskFull("no space left")

    def fill(_: Work) -> None:
        usage = shutil.disk_usage(job_dir.path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        monkeypatch.setattr(pipeline, "write_atomic", full)
        raise RuntimeError("file write failed")

    monkeypatch.setattr(pipeline, "STAGES", ((JobState.RUNNING, lambda _: False, fill),))
    assert main(job_dir) == 76


def test_trained_is_the_adapter_with_its_statistics(job_dir: JobDir) -> None:
    job_dir.adapter.mkdir()
    seal(job_dir.adapter)
    work = Work(job_dir, 1)
    assert not pipeline.trained(work)
    work.stats_file.write_text("{}")
    assert pipeline.trained(work)


def test_the_stages_are_those_of_the_contract() -> None:
    states = [state for state, _, _ in pipeline.STAGES]
    assert all(first.may_become(second) for first, second in zip(states, states[1:], strict=False))
    assert states[-1].may_become(JobState.SUCCEEDED)


def test_importing_the_pipeline_loads_no_torch() -> None:
    check = "import sys, trainer_node.pipeline; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[3], timeout=60).returncode == 0
