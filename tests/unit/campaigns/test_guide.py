"""The guide names every key of a spec and of a described lane, and every exit code has its place; the example is a good one."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from campaigns.cli import main as cli
from campaigns.described import LaneDescription
from campaigns.logs import REASONS
from campaigns.spec import (
    BudgetSpec,
    CampaignSpec,
    DomainSpec,
    GpuSpec,
    LaneSpec,
    NotifySpec,
    ObserveSpec,
    SamplingSpec,
    SourceSpec,
)
from config import errors
from config.errors import HafsError
from config.standard_output import READER_LEFT

GUIDE = Path("docs/guide.md").read_text()
EXAMPLE = Path("config/presets/example-campaign.toml")
TABLES: dict[str, type[BaseModel]] = {
    "domains.NAME": DomainSpec,
    "sources.NAME": SourceSpec,
    "lanes.NAME": LaneSpec,
    "lanes.NAME.gpu": GpuSpec,
    "budget": BudgetSpec,
    "sampling": SamplingSpec,
    "notify": NotifySpec,
    "observe": ObserveSpec,
}


def keys() -> set[str]:
    plain = {"name", "target", "domains.NAME", "sources.NAME", "routing.NAME"}
    assert set(CampaignSpec.model_fields) == {key.split(".")[0] for key in (*plain, *TABLES)}
    nested = {f"{table}.{key}" for table, model in TABLES.items() for key in model.model_fields}
    return (plain | nested) - {"lanes.NAME.gpu"}


def section(number: int) -> str:
    return GUIDE.split(f"\n## {number}. ")[1].split("\n## ")[0]


def test_the_guide_has_every_key_of_a_spec_and_no_other() -> None:
    assert set(re.findall(r"^\| `([\w.]+)` \|", section(2), re.MULTILINE)) == keys()


def test_the_guide_has_every_key_of_a_lane_that_is_simulated() -> None:
    assert [key for key in LaneDescription.model_fields if f"`{key}`" not in section(5)] == []


def test_the_guide_has_every_reason_why_a_lane_is_idle() -> None:
    named = {reason for row in re.findall(r"^\| (`.*?) \|", section(6), re.MULTILINE) for reason in re.findall(r"`(\w+)`", row)}
    assert named == set(REASONS)


def test_every_exit_code_can_be_looked_up() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HafsError)}
    told = re.findall(r"^\| (\d+) \|", Path("docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert sorted(map(int, told)) == sorted({0, 2, *codes, errors.INTERRUPTED, READER_LEFT})


@pytest.mark.parametrize("command", ["check", "simulate"])
def test_the_example_can_be_used_as_it_is(home: Path, command: str) -> None:
    result = CliRunner().invoke(cli.app, ["campaign", command, str(EXAMPLE)])
    assert result.exit_code == 0, result.output
