"""Garbage of the node: never what a job, a young push or the newest dataset of a name needs."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from config.contracts.job import JobState, JobView
from config.contracts.manifest import DatasetManifest, Segment
from config.errors import JobFailed, StoreCorrupt
from trainer_node import registry
from trainer_node.gc import collect
from trainer_node.registry import ModelRecord

LONG_AGO = time.time() - 30 * 24 * 3600


def put(root: Path, name: str, data: bytes = b"x", old: bool = True) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if old:
        os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def dataset(root: Path, name: str, words: str, age_s: float = 0.0, old: bool = True) -> str:
    """A dataset with a segment for each word; the older, the larger `age_s`."""
    segments = [Segment(sha256=hashlib.sha256(w.encode()).hexdigest(), rows=1, bytes=1, packed_bytes=1) for w in words.split()]
    manifest = DatasetManifest(name=name, campaigns=[name], segments=segments)
    for segment in segments:
        put(root, f"segments/{segment.sha256}.jsonl.zst", old=old)
    path = put(root, f"datasets/{manifest.id}.json", manifest.model_dump_json().encode(), old)
    if old:
        os.utime(path, (LONG_AGO - age_s, LONG_AGO - age_s))
    return manifest.id


def job(dataset_id: str, state: JobState = JobState.SUCCEEDED) -> JobView:
    return JobView(id="j", kind="sft", name="n", state=state, created_at=0, updated_at=0, dataset_id=dataset_id)


def version(root: Path, number: int, base_sha256: str) -> ModelRecord:
    named = {"name": "m", "version": number, "kind": "sft", "job": f"job-{number}", "base": "folder", "dataset_id": "d"}
    record = ModelRecord.model_validate({**named, "base_sha256": base_sha256, "adapter_sha256": "a"})
    registry.save(root, record)
    return record


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.name != "gc.lock"}


def test_only_what_nobody_needs_goes(tmp_path: Path) -> None:
    newest = dataset(tmp_path, "demo", "a b", 1)
    used = dataset(tmp_path, "demo", "a c", 2)
    superseded = dataset(tmp_path, "demo", "a d", 3)
    young = dataset(tmp_path, "demo", "e", old=False)
    put(tmp_path, "incoming/young.part", old=False)
    put(tmp_path, "segments/" + "f" * 64 + ".jsonl.zst", old=False)
    stay = names(tmp_path)
    put(tmp_path, "incoming/old.part")
    put(tmp_path, "segments/" + "0" * 64 + ".jsonl.zst")
    gone = {
        f"datasets/{superseded}.json",
        f"segments/{hashlib.sha256(b'd').hexdigest()}.jsonl.zst",
        f"datasets/{newest}.json",  # `young` is newer, and of the same name
        f"segments/{hashlib.sha256(b'b').hexdigest()}.jsonl.zst",
    }
    before = names(tmp_path)
    would = collect(tmp_path, [job(used)], dry_run=True)
    assert names(tmp_path) == before
    went = collect(tmp_path, [job(used)], dry_run=False)
    assert went == would and names(tmp_path) == stay - gone
    assert {each.name for each in went} == gone | {"incoming/old.part", "segments/" + "0" * 64 + ".jsonl.zst"}
    assert (tmp_path / "datasets" / f"{young}.json").exists()


def test_the_newest_dataset_of_a_name_stays_however_old(tmp_path: Path) -> None:
    dataset(tmp_path, "demo", "a", 5)
    kept = dataset(tmp_path, "demo", "a b", 1)
    other = dataset(tmp_path, "other", "c", 9)
    collect(tmp_path, [], dry_run=False)
    assert {path.stem for path in (tmp_path / "datasets").glob("*.json")} == {kept, other}
    assert len(list((tmp_path / "segments").iterdir())) == 3


def test_a_converted_base_goes_once_no_version_and_no_job_can_need_it(tmp_path: Path) -> None:
    put(tmp_path, "cache/bases/used.gguf")
    put(tmp_path, "cache/bases/young.gguf", old=False)
    put(tmp_path, "cache/bases/old.lock")
    version(tmp_path, 1, "used")
    deleted = version(tmp_path, 2, "deleted")
    registry.save(tmp_path, deleted.model_copy(update={"deleted": True}))
    stay = names(tmp_path)
    gone = {f"cache/bases/{name}" for name in ("deleted.gguf", "old.gguf", "cut.gguf.partial")}
    for name in gone:
        put(tmp_path, name)
    for state in (JobState.QUEUED, JobState.INTERRUPTED):
        assert collect(tmp_path, [job("d", state)], dry_run=False) == []
    assert {each.name for each in collect(tmp_path, [job("d", JobState.FAILED)], dry_run=False)} == gone
    assert names(tmp_path) == stay


def test_a_broken_registry_stops_it_before_anything_goes(tmp_path: Path) -> None:
    put(tmp_path, "incoming/old.part")
    (tmp_path / "registry.json").write_text("{")
    with pytest.raises(JobFailed, match="registry"):
        collect(tmp_path, [], dry_run=False)
    assert (tmp_path / "incoming" / "old.part").exists()


def test_a_broken_manifest_stops_it_before_anything_goes(tmp_path: Path) -> None:
    put(tmp_path, "incoming/old.part")
    put(tmp_path, "datasets/" + "0" * 64 + ".json", b"{")
    with pytest.raises(StoreCorrupt, match="no manifest"):
        collect(tmp_path, [], dry_run=False)
    assert (tmp_path / "incoming" / "old.part").exists()
