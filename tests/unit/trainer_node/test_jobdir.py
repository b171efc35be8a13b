"""What a killed submit leaves behind goes, and nothing else."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from config.contracts.job import JobSpec, TrainJob
from trainer_node.jobdir import JobDir, clear_orphans
from trainer_node.queue import Queue


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with closing(Queue(tmp_path)) as queue:
        yield queue


def left(root: Path, name: str, *files: str, age_s: float = 7200) -> Path:
    folder = root / "jobs" / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    at = folder.stat().st_mtime - age_s
    os.utime(folder, (at, at))
    return folder


def test_only_what_a_killed_submit_left_long_ago_goes(tmp_path: Path, queue: Queue) -> None:
    left(tmp_path, "sft-0001-dead", "job.json")
    left(tmp_path, "sft-0002-dead", ".job.json.k3x_1")
    left(tmp_path, "sft-0003-dead")
    just = left(tmp_path, "sft-0004-just", "job.json", age_s=0)
    worked = left(tmp_path, "sft-0005-work", "job.json", "attempts/1")
    (tmp_path / "jobs" / "a file").touch()
    spec = JobSpec(kind="sft", name="m", base="x", data=["d"])
    job = TrainJob(spec=spec, dataset_id="0" * 64, code_version="x", nonce="n")
    view, _ = queue.submit(job, lambda id_, job: JobDir(tmp_path / "jobs" / id_).write_job(job))
    queued = tmp_path / "jobs" / view.id
    os.utime(queued, (0, 0))
    assert sorted(clear_orphans(tmp_path, queue)) == ["sft-0001-dead", "sft-0002-dead", "sft-0003-dead"]
    assert {path for path in (tmp_path / "jobs").iterdir() if path.is_dir()} == {just, worked, queued}
    assert clear_orphans(tmp_path, queue) == []


def test_a_base_that_is_pinned_is_known_to_every_attempt(tmp_path: Path) -> None:
    folder = JobDir(tmp_path / "jobs" / "one")
    assert folder.base() == ""
    folder.write_base("hf:o/r@1f/f.gguf")
    assert JobDir(folder.path).base() == "hf:o/r@1f/f.gguf"
