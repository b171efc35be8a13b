"""The power goes in the middle of a real training: the next boot goes on from the last whole checkpoint."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from config.contracts.job import JobSpec, JobState, Metrics, TrainJob, TrainOptions
from config.contracts.sample import Message, Provenance, Sample
from tests.fakes.leftovers import end_nodes
from tests.fakes.node_dataset import put_dataset
from tests.fakes.tiny_model import write_tiny_model
from tests.fakes.waiting import wait_for
from trainer_node.jobdir import JobDir
from trainer_node.queue import Queue
from trainer_node.train.checkpoints import newest_complete, step_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
SAVE_STEPS = 4
BEFORE = (JobState.INTERRUPTED, JobState.QUEUED, JobState.PREPARING, JobState.RUNNING)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "node"
    path.mkdir()
    write_tiny_model(path / "tiny.gguf")
    yield path
    end_nodes(tmp_path)


def rows() -> bytes:
    samples = [
        Sample(
            id=str(n),
            domain="d",
            source_id=f"s{n}",
            messages=[Message(role="system", content="Be brief."), Message(role="user", content=f"What is {n}?")],
            completion="yes it is.",
            provenance=Provenance(campaign="c", task_id="t"),
        )
        for n in range(40)
    ]
    return "".join(sample.model_dump_json() + "\n" for sample in samples).encode()


def a_job(root: Path) -> TrainJob:
    train = TrainOptions(lr=1e-2, epochs=12, save_steps=SAVE_STEPS, dtype="float32", max_length=64)
    base, probe = str(root / "tiny.gguf"), "What is 7?"
    spec = JobSpec(kind="sft", name="hafs-reboot", base=base, data=["d"], system="Be brief.", probe=probe, train=train)
    return TrainJob(spec=spec, dataset_id=put_dataset(root, rows()), code_version="0", nonce="1")


def boot(root: Path, name: str) -> "subprocess.Popen[bytes]":
    """The real daemon, on a machine that calls its boot so."""
    argv = [sys.executable, "-P", "-m", "trainer_node.cli", "daemon", "--root", str(root)]
    return subprocess.Popen(argv, env={**os.environ, "HAFS_BOOT_ID": name, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def cut_the_power(daemon: "subprocess.Popen[bytes]", folder: JobDir) -> None:
    record = folder.runner(1)
    assert record is not None
    runner = psutil.Process(record.pid)
    victims = [runner, *runner.children(recursive=True), psutil.Process(daemon.pid)]
    for victim in victims:
        victim.kill()
    daemon.wait()
    psutil.wait_procs(victims, 20)


def test_a_reboot_goes_on_from_the_last_whole_checkpoint(root: Path) -> None:
    with closing(Queue(root)) as queue:
        id_ = queue.submit(a_job(root), lambda id_, job: JobDir(root / "jobs" / id_).write_job(job))[0].id
        folder = JobDir(root / "jobs" / id_)
        daemon = boot(root, "first")
        wait_for("whole checkpoint", lambda: step_of(newest_complete(folder.checkpoints)) >= SAVE_STEPS, 150)
        cut_the_power(daemon, folder)
        whole = step_of(newest_complete(folder.checkpoints))
        half = folder.checkpoints / "checkpoint-900"
        half.mkdir()
        (half / "adapter_model.safetensors").write_bytes(b"half of it")

        daemon = boot(root, "second")
        wait_for("training", lambda: queue.get(id_).state not in BEFORE, 150)
        assert queue.get(id_).state is not JobState.FAILED and queue.get(id_).attempt == 2, queue.get(id_)
        assert [e.detail for e in queue.events(id_) if e.state is JobState.INTERRUPTED] == ["its runner was cut off"]
    daemon.terminate()
    daemon.wait(20)
    second = folder.runner(2)
    assert second is not None and second.boot_id == "second" and second.fence == 2
    assert f"going on from the checkpoint of step {whole}\n" in folder.log_file(2).read_text()
    assert not half.exists(), "passed over"
    steps = [Metrics.model_validate_json(line).step for line in folder.metrics_file.read_bytes().splitlines()]
    assert steps == list(range(1, steps[-1] + 1)), "each step once, in order"
