"""What `hafs campaign` shows fits the terminal it is shown in, and says what each lane does."""

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console
from typer.testing import CliRunner

from agents.lanes import Idle, LaneView
from campaigns.cli import campaign_live, render, render_campaign
from campaigns.cli import main as cli
from campaigns.cli.render_campaign import DOING, campaign_view
from campaigns.live import Live, LiveState, RunView
from campaigns.picture import as_told
from campaigns.status import CampaignEnd, Progress
from tests.fakes.campaign_rows import call, files, spec, store
from tests.unit.campaigns.test_live import LANE

LONG = "gpu:qwen2.5-coder:14b-instruct-q4_K_M"


def told(lanes: list[LaneView], **changes: object) -> LiveState:
    progress = Progress(spec(budget={"max_usd": 5.0}))
    for number in range(3):
        progress.count(call(number))
    progress.count(call(3, "rejected"))
    files().path.mkdir(parents=True, exist_ok=True)
    return Live(files(), progress).publish(RunView(lanes, reserved_usd=0.25)).model_copy(update=changes)


def shown(state: LiveState, columns: int) -> list[str]:
    render.console.width = columns
    with render.console.capture() as captured:
        render.console.print(campaign_view(as_told(files(), state)), soft_wrap=False)
    return captured.get().splitlines()


@pytest.fixture(autouse=True)
def _width() -> Iterator[None]:
    width = render.console.width
    yield
    render.console.width = width


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_a_campaign_fits_its_terminal(columns: int) -> None:
    error = "cannot connect to http://127.0.0.1:9: Cannot connect to host 127.0.0.1:9 ssl:default [Connect call failed]"
    lanes = [replace(LANE, name=LONG), replace(LANE, name="box", idle="breaker", in_flight=0, last_error=error)]
    lines = shown(told(lanes), columns)
    assert max(map(len, lines)) <= columns
    text = " ".join(line.strip() for line in lines)
    for part in (
        "x: running",
        "3/9",
        "33 %",
        "accepted 75 % of 4 answers",
        "cost $2.00 of $5.00",
        "$0.2500 held",
        "flags 1",
        "2/4",
    ):
        assert part in text
    assert "waits: server does not answer" in text
    assert "Connect call failed" in text.replace("\n", " ")


@pytest.mark.parametrize("reason", get_args(Idle))
def test_every_reason_has_words_that_fit_below_a_name(reason: str) -> None:
    assert 0 < len(DOING[reason]) <= 30


def test_control_characters_of_a_server_never_reach_the_terminal() -> None:
    bad = replace(LANE, idle="closed", last_error="\x1b]0;title\x07 [bold]gone[/bold]")
    text = "\n".join(shown(told([bad], state="paused: \x1b[31mdisk"), 120))
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]gone[/bold]" in text


def test_domains_of_a_mixed_campaign_are_summed_up() -> None:
    state = told([LANE])
    figures = state.figures
    both = figures.model_copy(update={"domains": {**figures.domains, "rom": figures.domains["asm"]}})
    assert any(line.startswith("all ") and "6/9" in line for line in shown(state.model_copy(update={"figures": both}), 80))


@pytest.mark.parametrize("idle", ["", "limit"])
def test_a_lane_whose_server_serves_another_one_is_not_said_to_work(idle: Idle) -> None:
    waiting = replace(LANE, name="b", idle=idle, in_flight=0)
    assert "its server serves other lanes" in "\n".join(shown(told([replace(LANE, idle="limit"), waiting]), 80))
    alone = replace(LANE, idle="limit", endpoint="elsewhere")
    assert "its server serves other lanes" not in "\n".join(shown(told([alone, waiting]), 80))


def test_where_time_went_is_told_in_words() -> None:
    state = told([replace(LANE, idle_s={"breaker": 26.0, "rate": 117.0})])
    seen = replace(as_told(files(), state), pid=None, state="complete")
    render.console.width = 80
    with render.console.capture() as captured:
        render.console.print(campaign_view(seen), soft_wrap=False)
    assert "idle: rate limit reached 1:57, server does not answer 0:26" in captured.get()


@pytest.mark.parametrize("width", [80, 60])
def test_a_screen_that_was_resized_is_drawn_anew(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    seen, cleared = as_told(files(), told([LANE])), []
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(render, "console", console)
    monkeypatch.setattr(render, "on_screen", lambda: True)
    monkeypatch.setattr(console, "clear", lambda: cleared.append(console.width))
    with campaign_live._Screen() as screen:
        screen.show(seen)
        console.width = width
        screen.show(seen)
        screen.show(seen)
    assert cleared == ([] if width == 80 else [width])


def test_commands_are_told_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAFS_HOME", "a b")
    program = tmp_path / "bin" / "hafs"
    program.parent.mkdir()
    program.touch()
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert render.command("status") == f"HAFS_HOME='a b' {os.path.join('bin', 'hafs')} status"
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    assert render.command("status") == "HAFS_HOME='a b' hafs status"


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["campaign", *words])
    return result.exit_code, result.output


def test_status_list_and_report_in_json() -> None:
    with store():
        code, output = run("status", "x", "--json")
        assert (code, json.loads(output)["state"]) == (0, "running")
    Live(files(), Progress(spec())).publish(RunView([LANE]), CampaignEnd("budget", "met", 0, 0, 0.0))
    facts = json.loads(run("list", "--json")[1])[0]
    assert (facts["name"], facts["state"], facts["end"]["reason"]) == ("x", "stopped", "budget")
    assert facts["lanes"][0]["doing"] == "working"
    assert json.loads(run("report", "x", "--json")[1])["target"] == 9


def test_what_has_ended_is_told_with_the_way_on() -> None:
    with store():
        pass
    for words in (["status", "x"], ["watch", "x"], ["stop", "x"]):
        code, output = run(*words)
        assert code == 0
        assert "stopped" in output or "not running" in output
    assert "campaign resume x" in run("status", "x")[1]
    Live(files(), Progress(spec())).publish(RunView([LANE]), CampaignEnd("budget", "met", 0, 0, 0.0))
    assert "campaign resume x --max-usd USD" in run("status", "x")[1]
    code, output = run("extend", "x", "--by", "1")
    assert (code, "10 samples wanted (before: 9)" in output) == (0, True)


def test_the_words_of_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    for reason, code in (("done", 0), ("drained", 130), ("budget", 16), ("exhausted", 1)):
        end = CampaignEnd(reason, "so", 3, 2, 0.5)
        assert render_campaign.campaign_exit_code(end) == code
        render_campaign.campaign_end(end)
    assert "stopped at the budget: so (2 new, $0.5000 in all)" in capsys.readouterr().out
