"""Lineage: every sample of a version, who wrote it and for how much, from whichever side still has the rows."""

import io
import json
import shutil
from pathlib import Path

import anyio
import pytest
from rich.console import Console

from campaigns.cli import render, render_models
from campaigns.datasets import seal_named
from campaigns.lineage import Step, facts, lineage
from campaigns.sync.remote import Node
from campaigns.sync.segments import pack
from config.contracts.job import JobSpec, Perplexity, TrainJob
from config.contracts.manifest import DatasetManifest
from config.errors import ConfigError, JobNotFound
from config.settings import Settings, load_settings
from tests.fakes.campaign_rows import append, store
from tests.fakes.in_process_node import InProcessNode
from trainer_node import registry
from trainer_node.registry import ModelRecord

SAMPLES = 3


@pytest.fixture
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def manifest(settings: Settings) -> DatasetManifest:
    """Campaign x on the laptop, three samples, one answer rejected and one call failed, all sealed."""

    async def run() -> None:
        with store() as opened:
            for number in range(SAMPLES):
                await append(opened, number)
            await append(opened, 3, "rejected")
            await append(opened, 4, "failed")

    anyio.run(run)
    return seal_named(settings, ["x"]).manifest


@pytest.fixture
def root(tmp_path: Path, settings: Settings, manifest: DatasetManifest) -> Path:
    """A node that has trained two versions on it, the second one from the first."""
    path = tmp_path / "node"
    (path / "datasets").mkdir(parents=True)
    (path / "datasets" / f"{manifest.id}.json").write_text(manifest.model_dump_json())
    shutil.copytree(settings.segments, path / "segments")
    made(path, "one", manifest.id)
    made(path, "two", manifest.id, start="hafs-coder:14b-v1")
    return path


def made(root: Path, job: str, dataset_id: str, start: str = "") -> None:
    kind = "dpo" if start else "sft"
    draft = ModelRecord(
        name="hafs-coder",
        version=0,
        size="14b",
        kind=kind,
        job=job,
        base="b.gguf",
        base_sha256="b" * 64,
        dataset_id=dataset_id,
        adapter_sha256="a" * 64,
        start=start,
        passed=True,
        promotion=1 + bool(start),
        perplexity=Perplexity(rows=1, tokens=2, base=9, tuned=3),
    )
    record = registry.reserve(root, draft, [])
    spec = JobSpec.model_validate({"kind": kind, "name": "hafs-coder", "base": "b.gguf", "data": ["x"], "start": start})
    job_file = root / record.folder / "job.json"
    job_file.parent.mkdir(parents=True)
    job_file.write_text(TrainJob(spec=spec, dataset_id=dataset_id, code_version="1.2.3", nonce="n").model_dump_json())


def traced(settings: Settings, root: Path, model: str = "hafs-coder:latest") -> list[Step]:
    with Node("box", InProcessNode(root).dial) as node:
        return lineage(settings, node, model)


def test_an_alias_leads_to_every_sample_and_to_what_it_went_on_from(settings: Settings, root: Path) -> None:
    steps = traced(settings, root)
    assert [step.version.version.tag for step in steps] == ["hafs-coder:14b-v2", "hafs-coder:14b-v1"]
    for step in steps:
        assert [origin.id for origin in step.samples] == [f"t{number}" for number in range(SAMPLES)]
        (writer,) = step.writers
        assert (writer.campaign, writer.rows, writer.cost_usd) == ("x", SAMPLES, pytest.approx(0.5 * SAMPLES))
        (campaign,) = step.campaigns
        assert (campaign.accepted, campaign.rejected, campaign.failed) == (SAMPLES, 1, 1)
        assert campaign.reasons == {"flags": 2} and campaign.cost_usd == pytest.approx(2.5)
        assert campaign.templates[0].domain == "asm" and campaign.templates[0].system
        assert step.missing == []
        assert step.version.spec["name"] == "hafs-coder" and step.version.code == "1.2.3"


def test_rows_that_the_laptop_lost_are_fetched_and_the_lost_campaign_is_named(settings: Settings, root: Path) -> None:
    shutil.rmtree(settings.home)
    (step, _) = traced(settings, root)
    assert [origin.id for origin in step.samples] == ["t0", "t1", "t2"]
    assert step.campaigns == []
    assert "campaign x is not on this machine" in step.missing[0]


def test_a_campaign_that_is_broken_here_is_not_called_gone(settings: Settings, root: Path) -> None:
    (settings.training / "x" / "campaign.json").write_text("{}")
    (step, _) = traced(settings, root)
    assert len(step.samples) == SAMPLES and step.campaigns == []
    assert "campaign x is on this machine, but cannot be read" in step.missing[0]


def test_rows_that_are_none_and_names_that_are_paths_are_told(settings: Settings, root: Path) -> None:
    good = {"id": "a", "domain": "asm", "provenance": {"campaign": "../../x", "task_id": "a"}}
    lines = [good, {"id": "b"}, {"id": "c", "provenance": {"campaign": ["x"], "task_id": 1}}]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    sealed = pack(settings.segments, data, len(lines), 3)
    manifest = DatasetManifest(name="y", campaigns=["y"], segments=[sealed.segment])
    (root / "datasets" / f"{manifest.id}.json").write_text(manifest.model_dump_json())
    (settings.home / "x").mkdir()
    (settings.home / "x" / "pairs.jsonl").touch()
    made(root, "three", manifest.id)
    (step,) = traced(settings, root, "hafs-coder:v3")
    assert [origin.id for origin in step.samples] == ["a", "b"]
    assert "row 3 is none, so the rest was not read (provenance.campaign: " in step.missing[0]
    assert any('campaign ../../x is not on this machine: "../../x" cannot name a campaign' in text for text in step.missing)


def test_a_segment_that_was_damaged_here_is_not_believed(settings: Settings, root: Path) -> None:
    (path,) = settings.segments.glob("*.zst")
    path.write_bytes(b"other bytes")
    assert len(traced(settings, root)[0].samples) == SAMPLES


def test_what_both_lost_is_said(settings: Settings, root: Path) -> None:
    shutil.rmtree(root / "segments")
    shutil.rmtree(settings.segments)
    (step, _) = traced(settings, root)
    assert step.samples == [] and "neither this machine nor box has it" in step.missing[0]
    shutil.rmtree(root / "datasets")
    assert "box no longer has it" in traced(settings, root)[0].missing[0]


def test_a_deleted_version_is_still_part_of_the_way(settings: Settings, root: Path) -> None:
    first = registry.resolve(root, "hafs-coder:v1")
    registry.save(root, first.model_copy(update={"deleted": True}))
    shutil.rmtree(root / first.folder)
    steps = traced(settings, root)
    assert [step.version.deleted for step in steps] == [False, True]
    assert "was deleted on box" in steps[1].missing[0]
    with pytest.raises(JobNotFound):
        traced(settings, root, "hafs-coder:v1")


@pytest.mark.parametrize("model", ["", "../../etc/passwd", "a\x1bb", "x" * 201])
def test_what_can_be_no_name_is_refused(settings: Settings, root: Path, model: str) -> None:
    with pytest.raises(ConfigError, match="names no model") as caught:
        traced(settings, root, model)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(JobNotFound, match="was made on this node"):
        traced(settings, root, "llama3:8b")


def test_a_start_that_nobody_knows_is_named(settings: Settings, root: Path) -> None:
    second = registry.resolve(root, "hafs-coder:v2")
    registry.save(root, second.model_copy(update={"start": "elsewhere:v9"}))
    (step,) = traced(settings, root)
    assert "elsewhere:v9, which it went on from" in step.missing[-1]


def test_the_screen_has_a_summary_and_every_id_unless_it_is_not_wanted(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = traced(settings, root)

    def shown(samples: bool) -> str:
        console = Console(file=io.StringIO(), width=200, soft_wrap=True)
        monkeypatch.setattr(render, "console", console)
        render_models.lineage(steps, samples, False)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    text = shown(False)
    for part in (
        "hafs-coder:14b-v2",
        "goes on from hafs-coder:14b-v1",
        "b.gguf (SHA-256 bbbb",
        "perplexity 9.00 -> 3.00",
        "(samples, 3 rows)",
        "3 rows of x (asm) from 1 prompts",
        "$1.5000",
        "3 accepted, 1 rejected, 1 failed; $2.5000 for all calls",
        "not accepted for: flags 2",
        "template asm 1",
        "samples      3\n",
    ):
        assert part in text, part
    assert "  t2  " not in text
    assert text.count("t2") == 0 and shown(True).count("t2") == 2
    render_models.lineage(steps, False, True)
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(facts(steps)))
    assert [each["id"] for each in told[0]["samples"]] == ["t0", "t1", "t2"]
    assert told[0]["version"]["tag"] == "hafs-coder:14b-v2"
