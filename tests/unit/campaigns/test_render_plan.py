"""What `check` and `simulate` show: whole at 80 columns, as JSON for programs, and nothing that a terminal would obey."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from agents.task import Usage
from campaigns.check import Checked, check
from campaigns.cli import main as cli
from campaigns.cli import render_plan
from campaigns.cli.render_plan import clock, figure, money, plan_view, simulation_view, span
from campaigns.outlook import Probe, Range
from campaigns.simulate import simulate
from campaigns.spec import load_campaign
from config.settings import load_settings

SPEC = """
name    = "pilot-hybrid"
target  = 200
domains = { asm = 1.0 }
[budget]
max_usd = 5.0
[lanes.gpu]
provider = "ollama"
host     = "http://192.168.1.20:11434"
models   = ["qwen2.5-coder:14b-instruct-q4_K_M", "deepseek-coder:6.7b"]
[lanes.flash]
provider = "gemini"
model    = "gemini-2.5-flash"
rpm      = 300
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "hybrid.toml"
    path.write_text(SPEC)
    return path


def looked_at(spec: Path, *probes: Probe) -> Checked:
    checked = check(load_settings(), load_campaign(spec), spec.parent, show=render_plan.pulling)
    return Checked(checked.estimate, list(probes), [])


def shown(view: object, width: int) -> str:
    console = Console(width=width, highlight=False, emoji=False, force_terminal=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.254, "0.25"), (12.4, "12"), (820, "820"), (12_340, "12.3k"), (820e3, "820k"), (1.2e6, "1.2M")],
)
def test_figures_are_short(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "$0.00"), (1234.5, "$1,234.50"), (0.4, "$0.40"), (0.0339, "$0.034"), (0.00061, "$0.00061")]
)
def test_money_has_as_many_digits_as_matter(value: float, text: str) -> None:
    assert money(value) == text


def test_spans_and_times() -> None:
    assert span(Range(1, 2)) == "1–2"
    assert span(Range(100.1, 100.2)) == "100"
    assert [clock(seconds) for seconds in (40, 720, 12_600, 5 * 86400)] == ["40 s", "12 min", "3.5 h", "5.0 days"]


@pytest.mark.parametrize("width", [80, 200])
def test_a_plan_fits_and_says_who_is_asked(spec: Path, width: int) -> None:
    text = shown(plan_view(looked_at(spec)), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    flat = "".join(text.split())
    for words in ("qwen2.5", "(laneflash)", "nevermorethan$5.00inall", "Nobodywasaskedanything"):
        assert words in flat


def test_a_probe_is_shown_and_decides_the_exit_code(spec: Path) -> None:
    good = Probe("flash", latency_s=0.5, usage=Usage(300, 20), cost_usd=0.0004)
    lost = Probe("gpu:deepseek-coder:6.7b", error='lanes.gpu: host has no model "deepseek-coder:6.7b"', missing=True)
    down = Probe("flash", error="cannot be reached \x1b[31m")
    text = shown(plan_view(looked_at(spec, good, lost)), 120)
    assert "$0.00040" in text and "300 + 20" in text and "has no model" in text and "Nobody was asked" not in text
    assert "--pull fetches it" in text and "--probe sends" not in text
    assert "\x1b" not in shown(plan_view(looked_at(spec, down)), 120)
    codes = [render_plan.exit_code(looked_at(spec, *probes)) for probes in ((), (good,), (good, lost), (good, down), (down,))]
    assert codes == [0, 0, 17, 0, 11]


@pytest.mark.parametrize("width", [80, 200])
def test_a_simulation_fits(spec: Path, width: int) -> None:
    run = simulate(load_settings(), load_campaign(spec), spec.parent)
    text = shown(simulation_view(run), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "200 of 200 samples" in text and "…" not in text


def test_check_prints_json_and_asks_nobody(spec: Path, home: Path) -> None:
    result = CliRunner().invoke(cli.app, ["campaign", "check", str(spec), "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)["estimate"]
    assert plan["calls"]["low"] >= 200 and plan["max_usd"] == 5.0
    assert plan["domains"][0]["leaves_to"] == ["Google Gemini (lane flash)"]
    assert not home.exists()


def test_simulate_prints_json(spec: Path) -> None:
    options = ["--lane", "gpu=latency:0.5,par:4", "--seed", "3", "--json"]
    result = CliRunner().invoke(cli.app, ["campaign", "simulate", str(spec), *options])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert (facts["end"], facts["accepted"], facts["left"]) == ("done", 200, 0)
