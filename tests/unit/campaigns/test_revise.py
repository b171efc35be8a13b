"""A campaign goes on from what is stored of it, with another target or budget if one is given."""

import json
from pathlib import Path

import pytest

from campaigns.revise import extend, stored
from campaigns.store import Store, read_spec
from config.errors import ConfigError, StoreHeld
from tests.fakes.campaign_rows import files, spec, store


def test_the_stored_spec_and_its_folder(tmp_path: Path) -> None:
    with Store(files(), spec(), "1", tmp_path):
        pass
    assert stored(files()) == (spec(), tmp_path)
    cheaper, _ = stored(files(), max_usd=0.0)
    assert cheaper.budget.max_usd == 0.0


def test_another_target_and_budget_are_written_and_the_rest_stays(tmp_path: Path) -> None:
    with Store(files(), spec(), "1", tmp_path):
        pass
    before = json.loads(files().spec.read_text())
    change = extend(files(), target=None, by=3, max_usd=1.5)
    assert (change.old.target, change.new.target) == (9, 12)
    assert read_spec(files()) == change.new
    after = json.loads(files().spec.read_text())
    assert {key for key in before["spec"] if before["spec"][key] != after["spec"][key]} == {"target", "budget"}
    assert {key: value for key, value in before.items() if key != "spec"} == {
        key: value for key, value in after.items() if key != "spec"
    }
    with Store(files(), change.new, "1", tmp_path):  # it is the same campaign
        pass
    assert extend(files(), target=20, by=None, max_usd=None).new.budget.max_usd == 1.5


@pytest.mark.parametrize(
    "wanted",
    [
        {"target": None, "by": None, "max_usd": None},
        {"target": 5, "by": 5, "max_usd": None},
        {"target": None, "by": -9, "max_usd": None},
    ],
)
def test_what_makes_no_sense_changes_nothing(wanted: dict[str, int | None]) -> None:
    with store():
        pass
    with pytest.raises(ConfigError):
        extend(files(), **wanted)
    assert read_spec(files()) == spec()


def test_a_running_campaign_is_left_alone() -> None:
    with store(), pytest.raises(StoreHeld) as caught:
        extend(files(), target=20, by=None, max_usd=None)
    assert "hafs campaign stop x" in caught.value.hint
