"""Versions: a number for a job and a job for a number; only what passed the gate is found."""

import json
import multiprocessing
from pathlib import Path

import pytest

from config.contracts.job import Perplexity
from config.errors import JobFailed, JobNotFound
from trainer_node.registry import ModelRecord, records, reserve, resolve, save, size_label, standing, versions


def draft(job: str, name: str = "hafs-coder", size: str = "") -> ModelRecord:
    return ModelRecord(
        name=name, version=0, size=size, kind="sft", job=job, base="p", base_sha256="b", dataset_id="d", adapter_sha256="a"
    )


def passed(root: Path, job: str, name: str = "hafs-coder", size: str = "", promotion: int = 0) -> ModelRecord:
    record = reserve(root, draft(job, name, size), []).model_copy(
        update={
            "passed": True,
            "digest": job,
            "promotion": promotion,
            "perplexity": Perplexity(rows=1, tokens=2, base=9, tuned=3),
        }
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
    assert reserve(tmp_path, draft("three"), ["hafs-coder:14b-v11"]).version == 12, "of whatever size"


def test_a_version_number_is_not_given_out_again(tmp_path: Path) -> None:
    save(tmp_path, passed(tmp_path, "one").model_copy(update={"deleted": True}))
    assert reserve(tmp_path, draft("two"), []).version == 2
    assert reserve(tmp_path, draft("one"), []).version == 3, "not even to the same job"


@pytest.mark.parametrize(
    ("parameters", "label"),
    [
        (134_515_008, "135m"),
        (361_821_120, "360m"),
        (268_098_176, "270m"),
        (1_043_000_000, "1b"),
        (1_543_714_304, "1.5b"),
        (3_821_079_552, "3.8b"),
        (7_615_616_512, "7b"),
        (14_770_033_664, "14b"),
        (72_706_203_648, "72b"),
        (26_000_000, "26m"),
        (400_000, ""),
    ],
)
def test_sizes_are_called_as_at_ollama(parameters: int, label: str) -> None:
    assert size_label(parameters) == label


def test_the_size_stands_in_the_tag_and_the_number_alone_is_enough(tmp_path: Path) -> None:
    made = passed(tmp_path, "one", size="14b")
    assert (made.tag, made.folder) == ("hafs-coder:14b-v1", "models/hafs-coder/v1")
    for name in ("hafs-coder:14b-v1", "Hafs-Coder:14B-V1", "hafs-coder:v1", "hafs-coder:14b", "hafs-coder", "hafs-coder:latest"):
        assert resolve(tmp_path, name).job == "one", name
    with pytest.raises(JobNotFound, match="7b"):
        resolve(tmp_path, "hafs-coder:7b")


def test_only_what_passed_is_found(tmp_path: Path) -> None:
    passed(tmp_path, "one")
    reserve(tmp_path, draft("two"), [])
    assert resolve(tmp_path, "hafs-coder").tag == "hafs-coder:v1"
    assert [model.tag for model in versions(tmp_path)] == ["hafs-coder:v1"]
    with pytest.raises(JobNotFound, match="v2"):
        resolve(tmp_path, "hafs-coder:v2")


def test_what_failed_is_found_by_its_tag_by_who_inspects_it(tmp_path: Path) -> None:
    passed(tmp_path, "one", size="14b")
    save(tmp_path, reserve(tmp_path, draft("two", size="14b"), []).model_copy(update={"fault": "never stops"}))
    reserve(tmp_path, draft("three", size="14b"), [])
    for tag in ("hafs-coder:14b-v2", "Hafs-Coder:v2"):
        assert resolve(tmp_path, tag, failed=True).job == "two"
        with pytest.raises(JobNotFound):
            resolve(tmp_path, tag)
    for name in ("hafs-coder", "hafs-coder:14b"):
        assert resolve(tmp_path, name, failed=True).job == "one"
    with pytest.raises(JobNotFound):
        resolve(tmp_path, "hafs-coder:v3", failed=True)


def test_a_name_is_its_newest_version_until_one_was_promoted(tmp_path: Path) -> None:
    for job in ("one", "two"):
        passed(tmp_path, job)
    passed(tmp_path, "three", "other")
    assert resolve(tmp_path, "hafs-coder").version == 2
    assert resolve(tmp_path, "hafs-coder:latest").version == 2
    save(tmp_path, resolve(tmp_path, "hafs-coder:v1").model_copy(update={"promotion": 1}))
    assert resolve(tmp_path, "hafs-coder").version == 1
    assert resolve(tmp_path, "hafs-coder:v2").version == 2


def test_each_alias_names_the_version_of_its_kind_that_was_promoted_last(tmp_path: Path) -> None:
    passed(tmp_path, "one", size="14b", promotion=1)
    passed(tmp_path, "two", size="7b", promotion=3)
    passed(tmp_path, "three", size="14b", promotion=2)
    passed(tmp_path, "four", size="14b")
    found = {alias: record.job for alias, record in standing(records(tmp_path)).items()}
    assert found == {"hafs-coder:latest": "two", "hafs-coder:7b": "two", "hafs-coder:14b": "three"}


def test_a_registry_of_an_older_hafs_is_read_as_what_it_meant(tmp_path: Path) -> None:
    old = draft("x").model_dump(exclude={"aliases", "promotion", "size", "route", "fault", "deleted", "quantized", "quantizer"})
    rows = [
        {**old, "version": 1, "job": "one", "passed": True, "digest": "a", "alias": ""},
        {**old, "version": 2, "job": "two", "passed": True, "digest": "b", "alias": "hafs-coder:latest"},
        {**old, "version": 3, "job": "three", "passed": False, "alias": ""},
    ]
    (tmp_path / "registry.json").write_text(json.dumps({"models": rows}))
    assert [(each.tag, each.alias, each.promoted) for each in versions(tmp_path)] == [
        ("hafs-coder:v1", "", True),
        ("hafs-coder:v2", "hafs-coder:latest", True),
    ]
    assert standing(records(tmp_path))["hafs-coder:latest"].job == "two"
    assert resolve(tmp_path, "hafs-coder:v1").folder == "models/hafs-coder/v1"
    save(tmp_path, resolve(tmp_path, "hafs-coder:v1"))
    assert standing(records(tmp_path))["hafs-coder:latest"].job == "two", "also after it was written anew"
    assert reserve(tmp_path, draft("four", size="14b"), []).tag == "hafs-coder:14b-v4"


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
