"""Campaigns in the background: they survive their terminal, are watched, stopped and resumed from another one."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from config.locks import holder
from tests.fakes.served import served
from tests.fakes.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.skipif(os.name != "posix", reason="looks at sessions and terminals")]

HAFS = [sys.executable, "-P", "-m", "campaigns.cli.main", "campaign"]
SPEC = """
name = "away"
target = {target}
domains = {{ asm = 1.0 }}

[lanes.teacher]
provider = "ollama"
host = "{url}"
model = "{model}"
slots = 4

[notify]
command = ["{python}", "-c", "import sys; open('{notice}', 'w').write(sys.stdin.read())"]
"""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with served("fact_ollama", tmp_path, LAT="0.05", WRONG="5") as url:
        yield url


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(url: str, *, model: str = "teacher", target: int = 5000) -> Path:
        path = tmp_path / "away.toml"
        notice = (tmp_path / "notice.json").as_posix()
        path.write_text(SPEC.format(url=url, model=model, target=target, python=sys.executable, notice=notice))
        return path

    return written


@pytest.fixture(autouse=True)
def _nothing_left(home: Path) -> Iterator[None]:
    yield
    pid = holder(home / "training" / "away" / "campaign.lock")
    if pid:
        os.kill(pid, signal.SIGKILL)


def run(*words: str | Path, code: int = 0) -> str:
    done = subprocess.run([*HAFS, *map(str, words)], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def status() -> dict[str, object]:
    facts: dict[str, object] = json.loads(run("status", "away", "--json"))
    return facts


def accepted() -> int:
    counts = status()["accepted"]
    assert isinstance(counts, dict)
    return int(counts["asm"])


def test_it_survives_its_terminal_and_is_stopped_and_resumed_from_another(
    home: Path, tmp_path: Path, url: str, write: Callable[..., Path]
) -> None:
    path = write(url)
    controller, terminal = pty.openpty()
    starter = subprocess.Popen(
        [*HAFS, "start", str(path), "--detach"], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    assert starter.wait(60) == 0
    os.close(controller)  # the terminal is gone, and its session with it
    seen = status()
    assert seen["state"] == "running"
    pid = seen["process"]
    assert isinstance(pid, int) and os.getsid(pid) == pid
    before = accepted()
    wait_for("more samples", lambda: accepted() > before)

    told = run("stop", "away")
    assert f"asked process {pid} to stop" in told
    assert "stopped: " in told and "campaign resume away" in told
    seen = status()
    assert (seen["state"], seen["process"]) == ("stopped", None)
    log = (home / "logs" / "campaign_away.log").read_text().splitlines()
    assert " start target=5000 " in log[0]
    assert any("stop was asked for: what runs is finished" in line for line in log)
    assert "end reason=drained" in log[-1] or "notify" in log[-1]
    assert json.loads((tmp_path / "notice.json").read_text())["occasion"] == "end"

    path.unlink()  # what is stored of it is enough
    done = accepted()
    run("extend", "away", "--target", str(done + 20))
    assert "runs in the background" in run("resume", "away", "--detach") or accepted() == done + 20
    assert f"complete: {done + 20} of {done + 20} samples" in run("watch", "away")
    assert accepted() == done + 20


def test_stop_now_cancels(home: Path, tmp_path: Path, url: str, write: Callable[..., Path]) -> None:
    run("start", write(url), "-d")
    wait_for("samples", lambda: accepted() > 0)
    told = run("stop", "away", "--now")
    assert "it cancels" in told
    assert status()["state"] == "stopped"
    assert json.loads((tmp_path / "notice.json").read_text())["accepted"] == accepted()
    assert json.loads((home / "training" / "away" / "live.json").read_text())["end"]["new"] == accepted()
    assert "is not running" in run("stop", "away")


def test_a_foreground_campaign_heeds_a_stop_too(home: Path, url: str, write: Callable[..., Path]) -> None:
    child = subprocess.Popen([*HAFS, "start", str(write(url))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for("start", (home / "training" / "away" / "live.json").exists)
        run("stop", "away")
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, output
    assert "stopped: " in output


def test_a_terminal_that_is_closed_stops_a_foreground_campaign_as_ctrl_c_does(
    home: Path, url: str, write: Callable[..., Path]
) -> None:
    command = [*HAFS, "start", str(write(url))]
    pid, controller = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, where a campaign goes on
        os.execv(command[0], command)
    wait_for("samples", lambda: os.read(controller, 2**16) and accepted() > 0)
    os.close(controller)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert status()["state"] == "stopped"
    assert "end reason=drained" in (home / "logs" / "campaign_away.log").read_text()


def test_what_is_wrong_is_said_before_start_returns(write: Callable[..., Path], url: str) -> None:
    assert "has no model" in run("start", write(url, model="not-there"), "--detach", code=17)
    assert "127.0.0.1:9" in run("start", write("http://127.0.0.1:9"), "--detach", code=11)


def test_a_second_start_says_who_holds_it(write: Callable[..., Path], url: str) -> None:
    path = write(url)
    run("start", path, "--detach")
    assert f"process {status()['process']}" in run("start", path, "--detach", code=21)
    run("stop", "away")


def test_two_campaigns_at_once_and_one_that_was_killed(home: Path, write: Callable[..., Path], url: str) -> None:
    path = write(url)
    run("start", path, "--detach")
    run("start", path, "--detach", "--name", "beside", "--max-usd", "1")
    facts = {entry["name"]: entry for entry in json.loads(run("list", "--json"))}
    assert {name: entry["state"] for name, entry in facts.items()} == {"away": "running", "beside": "running"}
    assert facts["beside"]["max_usd"] == 1
    os.kill(facts["away"]["process"], signal.SIGKILL)
    wait_for("its end", lambda: holder(home / "training" / "away" / "campaign.lock") is None)
    assert "cut off" in run("status", "away")
    run("stop", "beside")
