"""Garbage of the laptop: what a campaign's record names stays, what was used today stays, the rest goes."""

import os
import time
from pathlib import Path

import pytest

from campaigns.datasets import seal_named
from campaigns.sync.gc import collect
from config.contracts.sample import Provenance, Sample
from config.settings import Settings


@pytest.fixture
def laptop(home: Path) -> Settings:
    settings = Settings(home=home)
    for name in ("a", "b"):
        row = Sample(
            id=name, domain="asm", source_id="s", messages=[], completion="c", provenance=Provenance(campaign=name, task_id="t")
        )
        (settings.training / name).mkdir(parents=True)
        (settings.training / name / "samples.jsonl").write_text(row.model_dump_json() + "\n")
        seal_named(settings, [name])
    return settings


def age(settings: Settings) -> set[str]:
    long_ago = time.time() - 3 * 24 * 3600
    for path in settings.segments.iterdir():
        os.utime(path, (long_ago, long_ago))
    return {path.name for path in settings.segments.iterdir()}


def test_what_campaigns_need_stays(laptop: Settings) -> None:
    before = age(laptop)
    assert collect(laptop, dry_run=False) == []
    assert {path.name for path in laptop.segments.iterdir()} == before and len(before) == 4


def test_a_campaign_that_is_gone_needs_nothing(laptop: Settings) -> None:
    (laptop.training / "a" / "samples.jsonl").unlink()
    assert collect(laptop, dry_run=False) == [], "used today"
    before = age(laptop)
    would = collect(laptop, dry_run=True)
    assert {path.name for path in laptop.segments.iterdir()} == before
    went = collect(laptop, dry_run=False)
    assert went == would and len(went) == 2 and all(each.bytes > 0 for each in went)
    assert any(each.name == "segments/a.samples.sealed" for each in went)
    assert seal_named(laptop, ["b"]).files[0].exists()


def test_without_anything_there_is_nothing_to_do(home: Path) -> None:
    assert collect(Settings(home=home), dry_run=False) == []
