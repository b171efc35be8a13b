"""Ids follow from content alone; states only go where they may."""

import itertools

import pytest
from pydantic import ValidationError

from config.contracts.base import canonical_json
from config.contracts.job import ENDED, STAGES, JobSpec, JobState, TrainJob
from config.contracts.manifest import DatasetManifest, Segment

SEGMENT = Segment(sha256="a" * 64, rows=3, bytes=100, packed_bytes=40)


def spec(**changes: object) -> JobSpec:
    return JobSpec.model_validate({"kind": "sft", "name": "m", "base": "x.gguf", "data": ["d"], **changes})


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": 1, "a": "ä"}) == b'{"a":"\\u00e4","b":1}' == canonical_json({"a": "ä", "b": 1})


def test_a_dataset_is_named_by_its_rows_not_by_its_packing() -> None:
    first = DatasetManifest(name="a", campaigns=["a"], segments=[SEGMENT])
    repacked = DatasetManifest(name="b", campaigns=["b"], segments=[SEGMENT.model_copy(update={"packed_bytes": 41})])
    other = DatasetManifest(name="a", campaigns=["a"], segments=[SEGMENT.model_copy(update={"sha256": "b" * 64})])
    assert first.id == repacked.id != other.id


def test_a_job_key_follows_from_spec_data_code_and_nonce() -> None:
    def key(**changes: object) -> str:
        return TrainJob.model_validate({"spec": spec(), "dataset_id": "d", "code_version": "1", "nonce": "n", **changes}).key

    keys = [key(), key(dataset_id="e"), key(code_version="2"), key(nonce="o"), key(spec=spec(name="n"))]
    assert len(set(keys)) == 5
    assert key() == keys[0]


def test_start_belongs_to_dpo() -> None:
    with pytest.raises(ValidationError, match="start belongs to a dpo job"):
        spec(start="x")
    with pytest.raises(ValidationError, match="needs start"):
        spec(kind="dpo")


@pytest.mark.parametrize("name", ["../x", "a b", "", "x/y", "-x", "A"])
def test_a_model_name_is_never_a_path(name: str) -> None:
    with pytest.raises(ValidationError):
        spec(name=name)


def test_ended_jobs_stay_ended_and_stages_go_forward() -> None:
    for old, new in itertools.product(JobState, JobState):
        if old in ENDED:
            assert not old.may_become(new)
        if old in STAGES and new in STAGES:
            assert old.may_become(new) == (STAGES.index(new) > STAGES.index(old))
    assert JobState.RUNNING.may_become(JobState.INTERRUPTED)
    assert JobState.INTERRUPTED.may_become(JobState.QUEUED)
    assert not JobState.RUNNING.may_become(JobState.SUCCEEDED)
    assert JobState.REGISTERING.may_become(JobState.SUCCEEDED)
