"""Commands whose output goes into a pipe that nobody reads any more, or onto a full disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from config import standard_output
from config.standard_output import READER_LEFT
from tests.fakes.served import served
from tests.fakes.waiting import wait_for

pytestmark = pytest.mark.integration

HAFS = (sys.executable, "-P", "-m", "campaigns.cli.main")
NODE = (sys.executable, "-P", "-m", "trainer_node.cli")
COMMANDS = [(*HAFS, "--help"), (*HAFS, "models", "list"), (*HAFS, "models", "list", "--json"), (*NODE, "status")]
ENDLESS = """
import sys, typer
from campaigns.cli import main, render, render_train
app = typer.Typer()
@app.command()
def follow() -> None:
    for number in range(10**6):
        {write}
main.app = app
main.main()
"""
WRITES = ["render.line(f'line {number}')", "render_train.log(b'line\\n' * 20_000)", "render.as_json({'line': number})"]


def into_closed_pipe(*command: str) -> tuple[int, bytes]:
    """The exit code and what was said of a command whose reader has left before it began."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writer)
    return done.returncode, done.stderr


def into_full_disk(*command: str) -> tuple[int, bytes]:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[3:]))
def test_a_reader_that_has_left_ends_the_command_without_a_word(command: tuple[str, ...]) -> None:
    assert into_closed_pipe(*command) == (READER_LEFT, b"")


@pytest.mark.parametrize("write", WRITES)
def test_a_reader_that_leaves_ends_what_would_go_on_for_long(write: str) -> None:
    command = (sys.executable, "-P", "-c", ENDLESS.format(write=write))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline()
        child.stdout.close()
        told = child.stderr.read()
        assert (child.wait(30), told) == (READER_LEFT, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[3:]))
def test_a_full_disk_is_an_error_that_names_standard_output(command: tuple[str, ...]) -> None:
    code, told = into_full_disk(*command)
    assert code == 22 and told.startswith(b"error: cannot write to standard output: No space left"), told
    assert len(told.splitlines()) == 2, told


def test_a_broken_pipe_of_something_else_is_an_error() -> None:
    """Typer alone would end with exit code 1, and say nothing."""
    code = ENDLESS.format(write="raise BrokenPipeError(32, 'Broken pipe')")
    done = subprocess.run((sys.executable, "-P", "-c", code), capture_output=True, timeout=60, check=False)
    assert done.returncode == 20 and done.stderr.startswith(b"error: what hafs was writing to has ended"), done.stderr


def test_an_error_keeps_its_exit_code_where_nobody_reads_it() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run((*HAFS, "campaign", "status", "nobody"), stdout=subprocess.PIPE, stderr=writer, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 3


def test_what_a_test_has_put_in_place_of_standard_output_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    standard_output.guard()
    assert sys.stdout is before


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_what_is_written_is_what_arrives(flags: tuple[str, ...]) -> None:
    code = (
        "import sys; from config.standard_output import guard; guard()\n"
        "sys.stdout.write('ä\\n' * 3); sys.stdout.flush(); sys.stdout.buffer.write(bytes(range(256)) * 4000)"
    )
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run((sys.executable, "-P", *flags, "-c", code), capture_output=True, timeout=60, env=env, check=True)
    assert done.stdout == b"\xe4\n" * 3 + bytes(range(256)) * 4000


SPEC = """
name = "unread"
target = 5000
domains = {{ asm = 1.0 }}

[lanes.teacher]
provider = "ollama"
host = "{url}"
model = "teacher"
slots = 8
"""
CAMPAIGN = "import sys; from campaigns.cli import campaign_live, main; campaign_live.LINE_EVERY_S = {every}; main.main()"


@pytest.mark.parametrize("every_s, interrupt", [(0.2, False), (1000, True)], ids=["leaves", "leaves with Ctrl-C"])
def test_a_campaign_whose_reader_leaves_finishes_what_runs(home: Path, tmp_path: Path, every_s: float, interrupt: bool) -> None:
    """`hafs campaign start FILE | tee LOG`: Ctrl-C reaches both, and tee is gone first."""
    with served("fact_ollama", tmp_path, LAT="0.3") as url:
        spec = tmp_path / "unread.toml"
        spec.write_text(SPEC.format(url=url))
        command = (sys.executable, "-P", "-c", CAMPAIGN.format(every=every_s), "campaign", "start", str(spec))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stderr is not None
            assert b"5000 samples wanted" in child.stdout.readline()
            child.stdout.close()
            calls = home / "training" / "unread" / "calls.jsonl"
            if interrupt:
                wait_for("the first call", lambda: calls.exists() and calls.stat().st_size)
                child.send_signal(signal.SIGINT)
            told = child.stderr.read()
            assert (child.wait(30), told) == (130, b"")
        answered = httpx.get(f"{url}/asked", trust_env=False).json()
        assert len(answered) == len(calls.read_bytes().splitlines()), "a call that ran was not kept"
