"""What the stages of a job share: saying, waiting, and the base, wherever it is."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
from huggingface_hub import constants

from config.contracts.base_name import HubFile
from config.contracts.job import JobSpec, JobState, TrainJob
from config.contracts.manifest import DatasetManifest, Segment
from config.errors import ConfigError, JobCancelled, ProviderUnavailable
from tests.fakes.hub import COMMIT, Hub
from tests.fakes.tiny_model import write_tiny_model
from trainer_node import aliases, registry
from trainer_node import hub as client
from trainer_node import work as module
from trainer_node.base_model import base_sha256
from trainer_node.dataset import Row
from trainer_node.jobdir import JobDir, Stage
from trainer_node.runtime.launch import RuntimeInfo
from trainer_node.work import Work

REPO, FILE = "owner/tiny", "tiny.gguf"


def a_job(root: Path, base: str, name: str = "one") -> JobDir:
    folder = JobDir(root / "jobs" / name)
    spec = JobSpec(kind="sft", name="m", base=base, data=["d"])
    folder.write_job(TrainJob(spec=spec, dataset_id="0" * 64, code_version="x", nonce=name))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> JobDir:
    return a_job(tmp_path, f"hf:{REPO}/{FILE}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf").read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: bytes) -> Iterator[Hub]:
    with Hub({REPO: {FILE: tiny}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub


def said(folder: JobDir, attempt: int = 1) -> str:
    stage = folder.stage(attempt)
    return stage.detail if stage else ""


def test_what_is_waited_for_is_told_and_gone_when_it_is_there(folder: JobDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_AFTER_S", 0.0)
    work, states = Work(folder, 1), []
    missing = iter(["Ollama", "Ollama, still", ""])

    def look() -> str:
        states.append(said(folder))
        return next(missing)

    work.wait_for(look)
    assert states == ["", "waits for Ollama", "waits for Ollama"], "figures that change are not told each time"
    assert folder.stage(1) == Stage(state=JobState.PREPARING)


def test_a_short_wait_is_not_told(folder: JobDir) -> None:
    missing = iter(["Ollama", ""])
    Work(folder, 1).wait_for(lambda: next(missing))
    assert folder.stage(1) is None


def test_a_stop_ends_the_wait(folder: JobDir) -> None:
    def look() -> str:
        folder.stop_file.touch()
        return "the end of days"

    with pytest.raises(JobCancelled):
        Work(folder, 1).wait_for(look)


def test_the_base_is_fetched_pinned_and_the_same_in_the_next_attempt(folder: JobDir, hub: Hub) -> None:
    base = Work(folder, 1).base
    assert folder.base() == f"hf:{REPO}@{COMMIT}/{FILE}"
    assert base.path.suffix == ".gguf" and base.layers == 2
    hub.repos.clear()
    asked = len(hub.asked)
    assert Work(folder, 2, offline=True).base.path == base.path
    assert len(hub.asked) == asked


def test_what_is_pinned_is_fetched_whatever_the_branch_has_become(folder: JobDir, hub: Hub) -> None:
    folder.write_base(f"hf:{REPO}@{COMMIT}/{FILE}")
    assert COMMIT in Work(folder, 1).base.path.parts
    assert all(f"/resolve/{COMMIT}/" in asked.path for asked in hub.asked if "/resolve/" in asked.path)


@pytest.fixture
def stopped_when_told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a job has told; the first word of it stops the job."""
    details: list[str] = []

    def write_stage(self: JobDir, attempt: int, stage: Stage) -> None:
        details.append(stage.detail)
        self.stop_file.touch()

    monkeypatch.setattr(JobDir, "write_stage", write_stage)
    return details


def test_a_fetch_is_told_in_figures_and_a_stop_ends_it(folder: JobDir, hub: Hub, stopped_when_told: list[str]) -> None:
    with pytest.raises(JobCancelled):
        _ = Work(folder, 1).base
    assert stopped_when_told == ["fetching tiny.gguf: 0 of 1 MB"]
    assert client.cached(HubFile(REPO, COMMIT, FILE)) is None


def test_rows_are_tokenized_in_figures_and_a_stop_ends_it(
    folder: JobDir, stopped_when_told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = Segment(sha256="0" * 64, rows=100_000, bytes=1, packed_bytes=1)
    manifest = DatasetManifest(name="d", kind="samples", campaigns=["d"], segments=[segment, segment])
    monkeypatch.setattr(module.dataset, "read_manifest", lambda root, dataset_id: manifest)
    monkeypatch.setattr(module.dataset, "read_rows", lambda root, manifest: repeat(Row("s", (), ("yes",)), 200_000))
    monkeypatch.setattr(Work, "special", [])
    monkeypatch.setattr(module, "encode", lambda tokenizer, row: pytest.fail("a row was encoded after the stop"))
    with pytest.raises(JobCancelled):
        _ = Work(folder, 1).data
    assert stopped_when_told == ["tokenizing: 0 of 200,000 rows"]


def test_offline_it_is_said_what_is_missing(folder: JobDir, hub: Hub) -> None:
    with pytest.raises(ConfigError, match="offline"):
        _ = Work(folder, 1, offline=True).base
    assert not hub.asked and folder.base() == ""


def test_an_ollama_that_has_answered_a_job_is_not_replaced(folder: JobDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was registered at another server nobody would find, and the job would say that it is done."""
    monkeypatch.delenv("HAFS_RUNTIME", raising=False)
    ollama = RuntimeInfo("http://ollama", embedded=False, version="1", started=False)
    own = RuntimeInfo("http://own", embedded=True, version="1", started=True)
    answers = [ollama]
    monkeypatch.setattr(aliases, "find_server", lambda root: answers[0] if answers else None)
    monkeypatch.setattr(aliases, "ensure_runtime", lambda root: own)
    work = Work(folder, 1)
    assert (work.server, work.connect().url, work.server) == ("embedded", "http://ollama", "ollama")
    for found in ([], [own]):
        answers[:] = found
        with pytest.raises(ProviderUnavailable, match="no Ollama answers"):
            Work(folder, 2).connect()
    answers[:] = [ollama]
    assert Work(folder, 3).connect().url == "http://ollama"
    monkeypatch.setenv("HAFS_RUNTIME", "embedded")
    answers[:] = []
    work = Work(folder, 4)
    assert (work.connect().url, work.server) == ("http://own", "embedded")


def test_every_attempt_goes_on_from_the_same_version(tmp_path: Path, tiny: bytes) -> None:
    base = tmp_path / "tiny.gguf"
    base.write_bytes(tiny)
    for number in (1, 2):
        named = {"name": "coder", "version": number, "kind": "sft", "job": f"sft-{number}", "base": str(base), "dataset_id": "d"}
        figures = {"base_sha256": base_sha256(base), "adapter_sha256": "a", "passed": True, "promotion": number}
        if number == 2:
            folder = JobDir(tmp_path / "jobs" / "dpo")
            spec = JobSpec(kind="dpo", name="m", base=str(base), data=["d"], start="coder")
            folder.write_job(TrainJob(spec=spec, dataset_id="0" * 64, code_version="x", nonce="n"))
            start = Work(folder, 1).start
            assert start is not None and start.tag == "coder:v1"
        registry.save(tmp_path, registry.ModelRecord.model_validate(named | figures))
    assert registry.resolve(tmp_path, "coder").tag == "coder:v2", "the name has gone on meanwhile"
    start = Work(folder, 2).start
    assert start is not None and start.tag == "coder:v1"
