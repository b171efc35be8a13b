"""Versions: a number for a job and a job for a number; only what passed the gate is found."""

import multiprocessing
from pathlib import Path

import pytest

from config.contracts.job import Perplexity
from config.errors import JobFailed, JobNotFound
from trainer_node.registry import ModelRecord, records, reserve, resolve, save, versions


def draft(job: str, name: str = "hafs-coder") -> ModelRecord:
    return ModelRecord(
        name=name, version=0, kind="sft", job=job, base="package:x", base_sha256="b", dataset_id="d", adapter_sha256="a"
    )


def passed(root: Path, job: str, name: str = "hafs-coder", alias: str = "") -> ModelRecord:
    record = reserve(root, draft(job, name), []).model_copy(
        update={"passed": True, "digest": job, "alias": alias, "perplexity": Perplexity(rows=1, tokens=2, base=9, tuned=3)}
    )
    save(root, record)
    return record


def test_a_job_keeps_its_number(tmp_path: Path) -> None:
    assert reserve(tmp_path, draft("one"), []).tag == "hafs-coder:v1"
    assert reserve(tmp_path, draft("two"), []).tag == "hafs-coder:v2"
    assert reserve(tmp_path, draft("one"), ["hafs-coder:v1"]).tag == "hafs-coder:v1"
    assert len(records(tmp_path)) == 2


def test_a_number_taken_at_the_server_is_not_free(tmp_path: Path) -> None:
    tags = ["hafs-coder:v4", "hafs-coder:latest", "hafs-coder2:v9", "hafsxcoder:v8"]
    assert reserve(tmp_path, draft("one"), tags).version == 5
    assert reserve(tmp_path, draft("two"), ["Hafs-Coder:V7"]).version == 8, "the server knows no case"


def test_only_what_passed_is_found(tmp_path: Path) -> None:
    passed(tmp_path, "one")
    reserve(tmp_path, draft("two"), [])
    assert resolve(tmp_path, "hafs-coder").tag == "hafs-coder:v1"
    assert [model.tag for model in versions(tmp_path)] == ["hafs-coder:v1"]
    with pytest.raises(JobNotFound, match="v2"):
        resolve(tmp_path, "hafs-coder:v2")


def test_a_name_is_its_newest_version(tmp_path: Path) -> None:
    for job in ("one", "two"):
        passed(tmp_path, job)
    passed(tmp_path, "three", "other")
    assert resolve(tmp_path, "hafs-coder").version == 2
    assert resolve(tmp_path, "hafs-coder:latest").version == 2
    assert resolve(tmp_path, "hafs-coder:v1").folder == "models/hafs-coder/v1"


def test_one_version_carries_the_alias(tmp_path: Path) -> None:
    for job in ("one", "two"):
        passed(tmp_path, job, alias="hafs-coder:latest")
    found = versions(tmp_path)
    assert [model.alias for model in found] == ["", "hafs-coder:latest"]
    assert (found[0].perplexity_base, found[0].perplexity_tuned) == (9, 3)


def test_a_broken_file_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "registry.json").write_text("{")
    with pytest.raises(JobFailed, match="broken"):
        reserve(tmp_path, draft("one"), [])
    assert (tmp_path / "registry.json").read_text() == "{"


def _reserve_some(root: Path, worker: int) -> None:
    for number in range(5):
        reserve(root, draft(f"{worker}-{number}"), [])


def test_jobs_that_register_at_once_get_different_numbers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_reserve_some, args=(tmp_path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(record.version for record in records(tmp_path)) == list(range(1, 16))
