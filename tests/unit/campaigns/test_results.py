"""What a job made is found by job or version, and fetched by name."""

import hashlib
from pathlib import Path

import pytest

from campaigns import results as module
from campaigns.results import Results, fetch, results_of
from campaigns.sync.pull import ORIGIN
from campaigns.sync.survey import NodeState, Seen
from config.contracts.job import JobResult, JobState, JobView
from config.contracts.wire import Artifact, ArtifactsResult, ModelVersion
from config.errors import JobNotFound
from config.settings import Settings

FILES = {"adapter.gguf": b"gguf", "adapter/adapter_config.json": b"{}", "report/report.md": b"#", "report/report.json": b"[]"}
RUNNING = JobView(id="sft-0002-b", kind="sft", name="coder", state=JobState.RUNNING, created_at=2, updated_at=2)
DONE = JobView(
    id="sft-0001-a",
    kind="sft",
    name="coder",
    state=JobState.SUCCEEDED,
    created_at=1,
    updated_at=1,
    result=JobResult(model="coder:v1"),
)
VERSION = ModelVersion(tag="coder:v1", kind="sft", job=DONE.id, base="b", dataset_id="d", created_at=1)


class Box:
    """A node with one version."""

    name = "box"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, data in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        self.asked: list[str] = []

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def call(self, verb: object, args: object, deadline_s: float) -> ArtifactsResult:
        self.asked.append(str(getattr(args, "model", "")))
        return self.listing()

    def listing(self) -> ArtifactsResult:
        files = [
            Artifact(name=name, path=str(self._folder / name), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in FILES.items()
        ]
        return ArtifactsResult(tag="coder:v1", files=files)

    def download(self, remote_path: str, target: object, offset: int, on_bytes: object) -> None:
        target.write(Path(remote_path).read_bytes()[offset:])  # type: ignore[attr-defined]


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    box = Box(tmp_path / "box")
    state = NodeState("box", Seen(at=1, jobs=[RUNNING, DONE], models=[VERSION]))
    monkeypatch.setattr(module, "connect", lambda settings, name: box)
    monkeypatch.setattr(module, "survey", lambda settings, names, whole: [state])
    return box


@pytest.mark.parametrize("text", ["sft-0001-a", "sft-0001", "coder:v1"])
def test_files_are_found_by_job_and_by_version(box: Box, home: Path, text: str) -> None:
    found = results_of(Settings(home=home), text)
    assert (found.node, found.found.tag, box.asked) == ("box", "coder:v1", ["coder:v1"])


def test_a_job_that_has_made_nothing_and_a_version_that_is_not_there(box: Box, home: Path) -> None:
    with pytest.raises(JobNotFound, match="has registered nothing .it is RUNNING.") as raised:
        results_of(Settings(home=home), "coder")
    assert "coder:v1" in raised.value.hint
    with pytest.raises(JobNotFound, match='no node has a model "coder:v9"'):
        results_of(Settings(home=home), "coder:v9")


def test_files_and_folders_are_fetched_by_name(box: Box, home: Path) -> None:
    settings = Settings(home=home)
    found = Results("box", box.listing())
    folder = fetch(settings, found, ["adapter.gguf", "report/"], lambda done, total: None)
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert folder == settings.models / "coder" / "v1"
    assert there == [ORIGIN, "adapter.gguf", "report/report.json", "report/report.md"]
    with pytest.raises(JobNotFound, match='has no "repor"') as raised:
        fetch(settings, found, ["repor"], lambda done, total: None)
    assert "report/report.md" in raised.value.hint
