"""What goes to a terminal that others have written: it may say anything, and command nothing."""

import io

import pytest
from rich.console import Console

from campaigns.cli import render, render_models, render_nodes
from campaigns.cli.screen import Screen
from campaigns.nodes import NodeState
from config.contracts.job import JobError, JobView

EVIL = "red \x1b[31m \x1b]0;owned\x07 \x9b2J end"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to a console that takes itself for a terminal."""
    written = io.StringIO()
    console = Console(file=written, width=200, soft_wrap=True, force_terminal=True, color_system=None)
    monkeypatch.setattr(render, "console", console)
    return written


def test_a_table_of_jobs_and_a_heading_command_no_terminal(shown: io.StringIO) -> None:
    view = JobView(
        id="j",
        name="n",
        kind="sft",
        state="FAILED",
        created_at=1,
        updated_at=1,
        attempt=1,
        error=JobError(code="JobFailed", message=EVIL),
    )
    render.jobs([view, view.model_copy(update={"error": None, "detail": EVIL})], False)
    render.heading(EVIL)
    assert shown.getvalue().count("red [31m ]0;owned 2J end") == 3
    assert not {"\x1b", "\x9b", "\x07"} & set(shown.getvalue())


def test_a_table_of_nodes_commands_no_terminal(shown: io.StringIO) -> None:
    render_nodes.states([NodeState(EVIL, EVIL, hafs=EVIL), NodeState(EVIL, EVIL, problem=EVIL)], False)
    header, healthy, silent, *_ = shown.getvalue().splitlines()
    assert (healthy.count("red [31m ]0;owned 2J end"), silent.count("red [31m ]0;owned 2J end")) == (3, 2)
    assert not {"\x1b", "\x9b", "\x07"} & set(shown.getvalue())


def test_nothing_moves_in_a_pipe_that_only_wants_colours(shown: io.StringIO) -> None:
    """FORCE_COLOR makes a terminal of it, and what is drawn over itself would be lines of a file."""
    with render_models.making() as making, render.transfer("sending") as sending, render.counted("answers", 9) as counted:
        making("quantizing", 1, 2)
        sending(1, 2)
        counted(1, 2)
    with Screen() as screen:
        assert not screen.live
        screen.draw("a picture")
    with render_nodes.setting_up("box") as progress:
        progress.working("fetching torch")
        assert shown.getvalue() == ""
        progress.step("an environment")
    assert shown.getvalue() == "  an environment\n"
