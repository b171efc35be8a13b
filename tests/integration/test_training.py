"""Jobs of the pipeline as the runner starts them: real child processes, a real model server, a tiny model."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import zstandard

from config.contracts.base import Tolerant
from config.contracts.job import ExportOptions, JobError, JobResult, JobSpec, JobState, Metrics, TrainJob, TrainOptions
from config.contracts.manifest import DataKind, DatasetManifest, Segment
from config.contracts.sample import Message, PreferencePair, Provenance, Sample
from config.contracts.wire import ExportArgs
from config.errors import JobFailed
from tests.fakes.hub import COMMIT, Hub
from tests.fakes.own_runtime import own_runtime
from tests.fakes.tiny_folders import write_folder
from tests.fakes.tiny_model import smollm2_gguf, write_tiny_model
from tests.fakes.waiting import wait_for
from trainer_node.export.quantize import choose
from trainer_node.export.request import ask
from trainer_node.jobdir import STOPPED, JobDir
from trainer_node.ollama import OllamaApi
from trainer_node.registry import resolve, save, versions
from trainer_node.runtime.launch import ensure_runtime

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SYSTEM = "Be brief."
PROVENANCE = Provenance(campaign="c", task_id="t")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A node with a tiny base and a dataset of each kind; its runtime is ended with it."""
    path = tmp_path_factory.mktemp("node")
    write_tiny_model(path / "tiny.gguf")
    with own_runtime(path, OMP_NUM_THREADS="1"):
        yield path


@pytest.fixture(scope="module")
def api(root: Path) -> Iterator[OllamaApi]:
    with OllamaApi(ensure_runtime(root).url) as client:
        yield client


def messages(number: int) -> list[Message]:
    return [Message(role="system", content=SYSTEM), Message(role="user", content=f"What is {number}?")]


def sample(number: int, system: str = SYSTEM) -> Sample:
    asked = [Message(role="system", content=system), *messages(number)[1:]]
    return Sample(
        id=f"{number}", domain="d", source_id=f"s{number}", messages=asked, completion="yes it is.", provenance=PROVENANCE
    )


def pair(number: int) -> PreferencePair:
    return PreferencePair(
        id=f"{number}",
        domain="d",
        source_id=f"s{number}",
        messages=messages(number),
        chosen="yes it is.",
        rejected="no it is not.",
        change="truth",
        provenance=PROVENANCE,
    )


def push(root: Path, rows: list[Sample] | list[PreferencePair], kind: DataKind) -> str:
    """What the inbox leaves: a sealed segment and a manifest. Returns the dataset's id."""
    raw = "".join(row.model_dump_json() + "\n" for row in rows).encode()
    packed = zstandard.ZstdCompressor().compress(raw)
    sha = hashlib.sha256(packed).hexdigest()
    (root / "segments").mkdir(exist_ok=True)
    (root / "segments" / f"{sha}.jsonl.zst").write_bytes(packed)
    segment = Segment(sha256=sha, rows=len(rows), bytes=len(raw), packed_bytes=len(packed))
    manifest = DatasetManifest(name="data", kind=kind, campaigns=["c"], segments=[segment])
    (root / "datasets").mkdir(exist_ok=True)
    (root / "datasets" / f"{manifest.id}.json").write_text(manifest.model_dump_json())
    return manifest.id


def submit(root: Path, job: str, dataset: str, name: str, start: str = "", base: str = "", **train: object) -> JobDir:
    options = {"lr": 1e-2, "epochs": 12, "save_steps": 5, "dtype": "float32", "max_length": 64} | train
    spec = JobSpec(
        kind="dpo" if start else "sft",
        name=name,
        base=base or str(root / "tiny.gguf"),
        data=["d"],
        start=start,
        system=SYSTEM,
        probe="What is 7?",
        train=TrainOptions.model_validate(options),
    )
    job_dir = JobDir(root / "jobs" / job)
    job_dir.write_job(TrainJob(spec=spec, dataset_id=dataset, code_version="x", nonce=job))
    return job_dir


def begin(job_dir: JobDir, attempt: int) -> subprocess.Popen[bytes]:
    log = job_dir.log_file(attempt)
    log.parent.mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "trainer_node.pipeline", "--job", str(job_dir.path), "--attempt", str(attempt)]
    source = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=job_dir.path, stdout=file, stderr=subprocess.STDOUT, env=os.environ | source)


def finish(job_dir: JobDir, attempt: int, code: int = 0) -> str:
    """Run one attempt to its end; its log."""
    child = begin(job_dir, attempt)
    try:
        found = child.wait(200)
    finally:
        child.kill()
    log = job_dir.log_file(attempt).read_text()
    assert found == code, log
    return log


def metrics(job_dir: JobDir) -> list[Metrics]:
    return [Metrics.model_validate_json(line) for line in job_dir.metrics_file.read_bytes().splitlines()]


def read(path: Path, model: type[Tolerant]) -> Tolerant:
    return model.model_validate_json(path.read_bytes())


@pytest.fixture(scope="module")
def samples(root: Path) -> str:
    return push(root, [sample(number) for number in range(40)], "samples")


@pytest.fixture(scope="module")
def tuned(root: Path, samples: str) -> JobDir:
    job_dir = submit(root, "sft", samples, "hafs-tiny")
    finish(job_dir, 1)
    return job_dir


def test_sft_ends_in_a_model_that_answers(root: Path, api: OllamaApi, tuned: JobDir) -> None:
    result = tuned.result()
    assert result is not None
    assert (result.model, result.alias, result.note) == ("hafs-tiny:v1", "hafs-tiny:latest", "")
    assert result.perplexity is not None
    assert result.perplexity.tuned < 2 < result.perplexity.base
    reply = api.chat("hafs-tiny:latest", [{"role": "user", "content": "What is 9?"}], options={})
    assert (reply["message"]["content"], reply["done_reason"]) == ("yes it is.", "stop")
    lines = metrics(tuned)
    assert [line.step for line in lines] == list(range(1, result.steps + 1))
    assert all(line.lr is not None and line.tokens_per_s and line.memory_mb for line in lines)
    kept = {path.name for path in (root / result.folder).iterdir()}
    files = {"adapter", "adapter.gguf", "Modelfile", "metrics.jsonl"}
    assert kept == files | {f"{name}.json" for name in ("job", "training_stats", "evaluation", "probes", "export", "dress")}
    assert [model.tag for model in versions(root)][:1] == ["hafs-tiny:v1"]
    stage = tuned.stage(1)
    assert stage is not None
    assert stage.state is JobState.REGISTERING


def test_a_lost_registration_is_repeated_without_training(root: Path, tuned: JobDir) -> None:
    first = tuned.result()
    before = tuned.metrics_file.read_bytes()
    tuned.result_file.unlink()
    log = finish(tuned, 2)
    assert "RUNNING done in an earlier attempt" in log
    assert tuned.metrics_file.read_bytes() == before
    assert tuned.result() == first
    assert len([model for model in versions(root) if model.tag.startswith("hafs-tiny:")]) == 1


def test_a_merged_job_registers_one_quantized_gguf(root: Path, api: OllamaApi, tuned: JobDir) -> None:
    """What the other job has trained, merged and quantized: nothing is trained again."""
    job = tuned.job()
    options = ExportOptions(route="merged", quantize="Q8_0", size="14b")
    job_dir = JobDir(root / "jobs" / "merged")
    spec = job.spec.model_copy(update={"name": "hafs-merged", "export": options})
    job_dir.write_job(job.model_copy(update={"spec": spec}))
    shutil.copytree(tuned.adapter, job_dir.adapter)
    for name in ("metrics.jsonl", "training_stats.json", "evaluation.json", "probes.json"):
        shutil.copy2(tuned.path / name, job_dir.path / name)
    finish(job_dir, 1)
    result = job_dir.result()
    assert result is not None
    assert (result.model, result.aliases) == ("hafs-merged:14b-v1", ["hafs-merged:14b", "hafs-merged:latest"])
    reply = api.chat("hafs-merged:14b", [{"role": "user", "content": "What is 9?"}], options={})
    assert (reply["message"]["content"], reply["done_reason"]) == ("yes it is.", "stop")
    record = resolve(root, "hafs-merged")
    assert (record.route, record.quantized, record.quantizer) == ("merged", "Q8_0", choose("Q8_0").name)
    kept = {path.name for path in (root / record.folder / "gguf").iterdir()}
    assert kept == {"Q8_0.gguf", "Q8_0.Modelfile"}, "nothing that was needed in between is left"


def test_of_safetensors_one_gguf_is_registered_unless_something_else_is_asked_for(
    root: Path, api: OllamaApi, samples: str
) -> None:
    job_dir = submit(root, "folder", samples, "hafs-folder", base=str(write_folder("qwen2", root / "folder")))
    log = finish(job_dir, 1)
    assert "(one GGUF in Q8_0)" in log
    record = resolve(root, "hafs-folder")
    assert (record.route, record.quantized, record.passed) == ("merged", "Q8_0", True), log
    assert {path.name for path in (root / record.folder / "gguf").iterdir()} == {"Q8_0.gguf", "Q8_0.Modelfile"}
    assert api.show("hafs-folder:latest")["details"]["quantization_level"] == "Q8_0"


@pytest.mark.parametrize(
    ("route", "asked", "files"),
    [
        ("merged", "Q4_K_M", ["gguf/{made}.gguf", "gguf/{made}.Modelfile"]),
        ("merged", "", ["gguf/{made}.gguf", "gguf/{made}.Modelfile"]),
        ("adapter", "", ["adapter.gguf", "Modelfile"]),
        ("hf", "", ["merged"]),
    ],
)
def test_another_form_of_a_version_is_made_on_request(
    root: Path, api: OllamaApi, tuned: JobDir, route: str, asked: str, files: list[str]
) -> None:
    """By a process of its own; asked again it is there already. A machine without llama-quantize makes no Q4_K_M, and says so."""
    made = "" if route != "merged" else choose(asked).makes if asked else "F16"
    files = [name.format(made=made) for name in files]
    folder = root / resolve(root, "hafs-tiny").folder
    (folder / "adapter.gguf").unlink(missing_ok=True)
    args = ExportArgs.model_validate({"model": "hafs-tiny", "route": route, "quantize": asked, "wait_s": 30})
    state = ask(root, args)
    assert (state.state, state.files, state.quantized, state.error) == ("done", files, made, None), state
    assert (f"{made} stands in for {asked}" in state.note) == (made not in ("", "F16", asked))
    stamps = [(folder / name).stat().st_mtime_ns for name in files]
    assert ask(root, args) == state
    assert stamps == [(folder / name).stat().st_mtime_ns for name in files]
    if route == "merged":
        name = f"again-{made.lower()}"  # of its own: one that is loaded is not made anew
        api.create(name, files={"model.gguf": folder / files[0]}, system=SYSTEM)
        reply = api.chat(name, [{"role": "user", "content": "What is 9?"}], options={"num_predict": 9, "temperature": 0})
        said = reply["message"]["content"]  # four bits are few for a matrix of 64 by 64
        assert said == "yes it is." if made == "F16" else said.startswith("yes")
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial") or path.name == ".F16.gguf"]


def test_an_export_that_cannot_be_made_says_why(root: Path, tuned: JobDir) -> None:
    record = resolve(root, "hafs-tiny")
    save(root, record.model_copy(update={"base_sha256": "0" * 64}))
    try:
        state = ask(root, ExportArgs(model="hafs-tiny", route="merged", quantize="Q5_1", wait_s=30))
    finally:
        save(root, record)
    assert state.state == "failed" and state.error is not None
    assert "no longer the file" in state.error.message
    with pytest.raises(JobFailed, match="does not go with"):
        ask(root, ExportArgs(model="hafs-tiny", route="hf", quantize="Q8_0"))


def test_dpo_goes_on_from_the_sft_adapter(root: Path, tuned: JobDir) -> None:
    pairs = push(root, [pair(number) for number in range(40)], "pairs")
    job_dir = submit(root, "dpo", pairs, "hafs-tiny-dpo", start="hafs-tiny", lr=1e-3, epochs=3)
    finish(job_dir, 1)
    result = job_dir.result()
    assert result is not None
    assert result.model == "hafs-tiny-dpo:v1"
    assert result.pairs is not None
    assert result.pairs.reward_accuracy == 1
    assert result.pairs.reward_margin > 0
    lines = metrics(job_dir)
    assert lines[0].loss == pytest.approx(0.6931, abs=1e-3)  # the reference is the adapter it begins with
    assert lines[-1].loss is not None
    assert lines[-1].loss < 0.6
    assert "rewards/margins" in lines[-1].extra
    assert resolve(root, "hafs-tiny-dpo").start == "hafs-tiny:v1"


def test_a_killed_run_goes_on_and_takes_the_same_steps(root: Path, samples: str, tuned: JobDir) -> None:
    """kill -9 after a checkpoint, half a checkpoint on top of it: the losses are those of the run that was left alone."""
    job_dir = submit(root, "killed", samples, "hafs-killed")
    child = begin(job_dir, 1)
    wait_for("whole checkpoint", lambda: (job_dir.checkpoints / "checkpoint-10" / "COMPLETE.json").exists())
    child.send_signal(signal.SIGKILL)
    child.wait(20)
    assert not job_dir.adapter.exists()
    torn = job_dir.checkpoints / "checkpoint-999"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    log = finish(job_dir, 2)
    assert "going on from the checkpoint of step" in log
    assert not torn.exists()
    assert [(line.step, line.loss) for line in metrics(job_dir)] == [(line.step, line.loss) for line in metrics(tuned)]


def test_the_stop_file_ends_the_run_and_keeps_the_step(root: Path, samples: str) -> None:
    job_dir = submit(root, "stopped", samples, "hafs-stopped", save_steps=1000)
    child = begin(job_dir, 1)
    wait_for("metrics", lambda: job_dir.metrics_file.exists() and job_dir.metrics_file.stat().st_size > 0)
    job_dir.stop_file.touch()
    assert child.wait(60) == STOPPED
    step = metrics(job_dir)[-1].step
    assert (job_dir.checkpoints / f"checkpoint-{step}" / "COMPLETE.json").exists()
    job_dir.stop_file.unlink()
    assert f"going on from the checkpoint of step {step}\n" in finish(job_dir, 2)
    assert [line.step for line in metrics(job_dir)] == list(range(1, metrics(job_dir)[-1].steps + 1))


def test_a_model_that_does_not_stop_fails_the_gate_and_keeps_its_files(root: Path, api: OllamaApi, samples: str) -> None:
    job_dir = submit(root, "raw", samples, "hafs-raw", epochs=0.1, lr=1e-6)
    finish(job_dir, 1, code=44)
    error = read(job_dir.attempt(1) / "error.json", JobError)
    assert isinstance(error, JobError)
    assert error.code == "GateFailed"
    assert job_dir.adapter_gguf.exists()
    assert not job_dir.result_file.exists()
    assert "hafs-raw:latest" not in api.tags()
    assert "hafs-raw:v1" in api.tags()
    assert not [model for model in versions(root) if model.tag.startswith("hafs-raw")]
    stats = job_dir.path / "training_stats.json"
    steps = json.loads(stats.read_bytes())["steps"]
    adapter = (job_dir.adapter / "adapter_model.safetensors").read_bytes()
    stats.unlink()  # as if cut off just before they were written: no step is left, and none is taken
    assert "going on from the checkpoint" in finish(job_dir, 2, code=44)
    assert json.loads(stats.read_bytes())["steps"] == steps == len(metrics(job_dir))
    assert (job_dir.adapter / "adapter_model.safetensors").read_bytes() == adapter


def test_a_latest_that_hafs_did_not_make_is_left_alone(root: Path, api: OllamaApi, samples: str) -> None:
    api.create("hafs-mine:latest", files={"base.gguf": root / "tiny.gguf"}, system="Mine.")
    before = api.tags()["hafs-mine:latest"]
    job_dir = submit(root, "mine", samples, "hafs-mine")
    finish(job_dir, 1)
    result = read(job_dir.result_file, JobResult)
    assert isinstance(result, JobResult)
    assert (result.model, result.alias) == ("hafs-mine:v1", "")
    assert "not made by hafs" in result.note
    assert api.tags()["hafs-mine:latest"] == before


@contextmanager
def in_use(api: OllamaApi, model: str) -> Iterator[None]:
    """A long answer of the model is under way; who asked hangs up at the end."""
    story = [{"role": "user", "content": "Write a very long story about a dog, a cat and a horse. Never stop."}]
    options = {"temperature": 0, "num_predict": 3000, "num_ctx": 4096, "repeat_penalty": 1.3}
    body = {"model": model, "messages": story, "options": options}
    with httpx.stream("POST", f"{api.url}/api/chat", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: httpx hangs up when it is dropped
        next(lines)
        yield


def test_a_base_of_the_hub_is_fetched_on_after_a_kill_and_trained_once_the_model_server_is_idle(
    root: Path, api: OllamaApi, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching, killed with -9 in the middle; then what others have loaded is waited for, by name; then the job is as any."""
    data = (root / "tiny.gguf").read_bytes()
    job_dir = submit(root, "hub", samples, "hafs-hub", base="hf:owner/tiny-GGUF@v1/tiny.gguf")
    with Hub({"owner/tiny-GGUF": {"tiny.gguf": data}}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        hub.hold_after = len(data) // 2
        child = begin(job_dir, 1)
        wait_for(
            "a third of the file",
            lambda: any(part.stat().st_size > len(data) // 3 for part in tmp_path.glob("cache/*/blobs/*.part")),
        )
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        (part,) = tmp_path.glob("cache/*/blobs/*.part")
        came = part.stat().st_size
        api.create("busy", files={"base.gguf": smollm2_gguf()})
        hub.hold_after = (len(data) - came) // 2
        child = begin(job_dir, 2)
        wait_for("more of the file", lambda: part.stat().st_size > came)
        with in_use(api, "busy"):
            hub.go_on.set()
            wait_for("news of who holds it", lambda: "which still holds busy:latest" in detail(job_dir, 2))
            assert child.poll() is None and not job_dir.checkpoints.exists()
        assert child.wait(200) == 0, job_dir.log_file(2).read_text()
        assert [asked.range for asked in hub.bodies()] == ["", f"bytes={came}-"]
    log = job_dir.log_file(2).read_text()
    assert f"base: hf:owner/tiny-GGUF@{COMMIT}/tiny.gguf" in log
    assert log.index("fetching hf:") < log.index("waits for the model server") < log.index("RUNNING")
    assert "busy:latest" not in api.loaded()
    assert job_dir.result_file.exists()
    assert resolve(root, "hafs-hub").base == f"hf:owner/tiny-GGUF@{COMMIT}/tiny.gguf"


def detail(job_dir: JobDir, attempt: int) -> str:
    stage = job_dir.stage(attempt)
    return stage.detail if stage else ""


def test_another_system_message_is_told_before_anything_is_trained(root: Path) -> None:
    dataset = push(root, [sample(number, "Be long.") for number in range(4)], "samples")
    job_dir = submit(root, "system", dataset, "hafs-system")
    finish(job_dir, 1, code=42)
    error = read(job_dir.attempt(1) / "error.json", JobError)
    assert isinstance(error, JobError)
    assert error.code == "JobFailed"
    assert "Be long." in error.message
    stage = job_dir.stage(1)
    assert stage is not None
    assert stage.state is JobState.PREPARING
    assert not job_dir.checkpoints.exists()
