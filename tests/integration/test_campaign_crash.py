"""kill -9, Ctrl-C and a second process against a running campaign; the model server is the outside witness."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.fakes.served import served
from tests.fakes.waiting import wait_for

pytestmark = pytest.mark.integration
log = logging.getLogger(__name__)

SLOTS = 8
TARGET = 150
MANY = 500  # more than is done between the kills
KILLS = int(os.environ.get("HAFS_KILLS", "30"))
KILLS_A_CAMPAIGN = 10
SPEC = f"""
name = "crash"
target = {TARGET}
domains = {{ asm = 1.0 }}

[lanes.teacher]
provider = "ollama"
host = "URL"
model = "teacher"
slots = {SLOTS}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with served("fact_ollama", tmp_path, LAT="0.03", WRONG="5") as url:
        yield url


@pytest.fixture
def spec(tmp_path: Path, server: str) -> Path:
    path = tmp_path / "crash.toml"
    path.write_text(SPEC.replace("URL", server))
    return path


def start(spec: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "campaigns.cli.main", "campaign", "start", str(spec)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(home: Path, name: str) -> list[dict[str, Any]]:
    path = home / "training" / "crash" / name
    data = path.read_bytes() if path.exists() else b""
    assert not data or data.endswith(b"\n"), f"{name} is torn"
    return [json.loads(line) for line in data.splitlines()]


class Killed:
    """A campaign that is killed again and again. Witnesses: the server's list of prompts, and a pipe of acknowledged ids."""

    def __init__(self, home: Path, server: str, spec: Path) -> None:
        self._folder, self._server, self._spec = home / "training" / "crash", server, spec
        self.acknowledged: list[str] = []
        self.sent_only = 0  # calls that were sent and not acknowledged when their process was killed
        self.kills = 0

    def live(self, kill_after_s: float, *, from_the_start: bool) -> bool:
        """One life: kill -9 so long after its start, or after its first acknowledged call. True: it had ended before."""
        sent, known = len(asked(self._server)), len(self.acknowledged)
        child, pipe = self._start()
        try:
            if not from_the_start:
                self.acknowledged += [line.strip() for line in [pipe.readline()] if line]
            ended = _ended_within(child, kill_after_s)
        finally:
            child.kill()
            child.wait()
        with pipe:
            self.acknowledged += [line.strip() for line in pipe if line.endswith("\n")]
        if not ended:
            self.kills += 1
            unknown = len(asked(self._server)) - sent - (len(self.acknowledged) - known)
            assert unknown <= 2 * SLOTS, f"{unknown} calls were sent and not acknowledged"
            self.sent_only += unknown
        self._check_nothing_lost()
        return ended

    def finish(self) -> str:
        """Let it run to its end; what it printed."""
        child, pipe = self._start(output=subprocess.PIPE)
        assert child.stdout is not None
        with pipe, child.stdout:
            try:
                self.acknowledged += [line.strip() for line in pipe]
                output = child.stdout.read()
                assert child.wait(timeout=60) == 0, output
            finally:
                child.kill()
                child.wait()
        return output

    def _start(self, output: int = subprocess.DEVNULL) -> tuple[subprocess.Popen[str], IO[str]]:
        reading, writing = os.pipe()
        command = [sys.executable, "-P", "tests/fakes/telling_campaign.py", str(self._spec), str(writing)]
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, pass_fds=[writing], env=environment)
        os.close(writing)
        return child, os.fdopen(reading)

    def _check_nothing_lost(self) -> None:
        calls = {row["task_id"] for row in self._whole("calls.jsonl")}
        kept = {row["id"] for name in ("samples.jsonl", "rejected.jsonl") for row in self._whole(name)}
        assert set(self.acknowledged) <= calls, "an acknowledged call is gone"
        assert set(self.acknowledged) <= kept, "an acknowledged row is gone"
        assert len(set(self.acknowledged)) == len(self.acknowledged), "a call was acknowledged twice"

    def _whole(self, name: str) -> list[dict[str, str]]:
        path = self._folder / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]


def asked(server: str) -> list[str]:
    with urllib.request.urlopen(f"{server}/asked", timeout=5) as reply:
        return list(json.load(reply))


def _ended_within(child: subprocess.Popen[str], seconds: float) -> bool:
    try:
        child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="inherits a pipe by its number")
@pytest.mark.parametrize("seed", range(KILLS // KILLS_A_CAMPAIGN))
def test_kill_9_loses_nothing_and_doubles_nothing(home: Path, server: str, spec: Path, seed: int) -> None:
    spec.write_text(spec.read_text().replace(f"target = {TARGET}", f"target = {MANY}"))
    chance, campaign = random.Random(seed), Killed(home, server, spec)
    for _ in range(KILLS_A_CAMPAIGN):
        if chance.random() < 0.25:
            campaign.live(chance.uniform(0.0, 1.5), from_the_start=True)
        elif campaign.live(chance.uniform(0.0, 0.15), from_the_start=False):
            break
    campaign.finish()
    accepted, refused, calls = rows(home, "samples.jsonl"), rows(home, "rejected.jsonl"), rows(home, "calls.jsonl")
    assert len(accepted) == MANY
    ids = [row["id"] for row in accepted + refused]
    assert len(set(ids)) == len(ids)
    assert sorted(ids) == sorted(call["task_id"] for call in calls)
    assert set(campaign.acknowledged) <= set(ids)
    repeated = len(asked(server)) - len(calls)
    assert 0 <= repeated <= campaign.sent_only, f"{repeated} calls were sent again after {campaign.kills} kills"
    assert campaign.kills >= KILLS_A_CAMPAIGN / 2
    log.info("%d kills, %d calls acknowledged, %d sent again", campaign.kills, len(campaign.acknowledged), repeated)


def test_ctrl_c_finishes_what_runs_and_the_next_run_continues(home: Path, server: str, spec: Path) -> None:
    child = start(spec)
    log = home / "logs" / "campaign_crash.log"
    wait_for("log line", lambda: log.exists() and "accepted" in log.read_text())
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 130, output
    assert "finishing what runs" in output
    assert 0 < len(rows(home, "samples.jsonl")) < TARGET
    with urllib.request.urlopen(f"{server}/prompts", timeout=5) as reply:
        assert len(json.load(reply)) == len(rows(home, "calls.jsonl")), "a call that ran was not kept"
    child = start(spec)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    assert len(rows(home, "samples.jsonl")) == TARGET


def test_a_second_process_is_turned_away_and_status_and_logs_work_beside_the_first(home: Path, spec: Path) -> None:
    spec.write_text(spec.read_text().replace(f"target = {TARGET}", "target = 5000"))  # more than it can do meanwhile
    child = start(spec)
    try:
        log = home / "logs" / "campaign_crash.log"
        wait_for("log line", lambda: log.exists() and "accepted" in log.read_text())
        second = start(spec)
        output, _ = second.communicate(timeout=30)
        assert second.returncode == 21
        assert f"process {child.pid}" in output
        command = [sys.executable, "-P", "-m", "campaigns.cli.main", "campaign"]
        status = subprocess.run([*command, "status", "crash", "--json"], stdout=subprocess.PIPE, text=True, check=True)
        assert json.loads(status.stdout)["state"] == "running"
        follow = subprocess.Popen([*command, "logs", "crash", "-f"], stdout=subprocess.PIPE, text=True)
        assert follow.stdout and "start target=5000" in follow.stdout.readline()
    finally:
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
    followed, _ = follow.communicate(timeout=30)  # it ends with the campaign
    assert "end reason=drained" in followed.splitlines()[-1]


def test_a_dead_server_is_one_message_with_its_own_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "dead.toml"
    path.write_text(SPEC.replace("URL", "http://127.0.0.1:9"))
    child = start(path)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 11
    assert "127.0.0.1:9" in output
    assert "ollama serve" in output


PAID = """
own = false

[budget]
max_usd = 1.0
"""
PRICES = """
[[price]]
provider = "ollama"
model = "teacher"
input = 0.0
output = 100.0
"""


@pytest.mark.skipif(os.name != "posix", reason="inherits a pipe by its number")
def test_paid_calls_that_a_kill_cut_off_count_as_spent(home: Path, server: str, spec: Path) -> None:
    spec.write_text(spec.read_text().replace(f"target = {TARGET}", f"target = {MANY}") + PAID)
    home.mkdir(exist_ok=True)
    (home / "prices.toml").write_text(PRICES)
    campaign = Killed(home, server, spec)
    for _ in range(3):
        assert not campaign.live(0.05, from_the_start=False)
        assert (home / "training" / "crash" / "reserved.json").exists()
    child = start(spec)
    output, _ = child.communicate(timeout=60)
    assert "the budget of $1 is met" in output, output
    calls = rows(home, "calls.jsonl")
    cut_off = [call for call in calls if call["reason"] == "cut_off"]
    assert len({call["task_id"] for call in cut_off}) == len(cut_off) == 3
    assert all(call["cost_assumed"] for call in cut_off)
    answer_usd = min(call["cost_usd"] for call in calls if call["verdict"] == "accepted")
    spent = sum(call["cost_usd"] for call in calls)
    assert len(asked(server)) * answer_usd <= spent <= 1.0 + 1e-9
    assert not (home / "training" / "crash" / "reserved.json").exists()


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """Where campaigns are written, with no room for one. To be made larger: `enlarge`."""
    small = home / "training"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        yield small
    finally:
        subprocess.run(["umount", small], check=True)


def enlarge(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=16m", small], check=True)


def ended_well(child: subprocess.Popen[str], home: Path, kept: set[str]) -> None:
    """The campaign reaches its target, and has what was `kept` before."""
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    ids = [row["id"] for row in rows(home, "samples.jsonl")]
    assert len(ids) == len(set(ids)) == TARGET
    assert kept <= set(ids)


def paused(home: Path) -> bool:
    log = home / "logs" / "campaign_crash.log"
    return log.exists() and "paused: no space left for" in log.read_text()


needs_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small tmpfs: needs root")


@needs_root
def test_a_full_disk_pauses_the_campaign_and_it_goes_on_when_there_is_room(home: Path, spec: Path, small_disk: Path) -> None:
    child = start(spec)
    try:
        wait_for("pause", lambda: paused(home))
        assert child.poll() is None
        kept = {json.loads(line)["id"] for line in (small_disk / "crash" / "samples.jsonl").read_text().splitlines()}
        enlarge(small_disk)
        ended_well(child, home, kept)
    finally:
        child.kill()
        child.communicate()


@needs_root
def test_ctrl_c_on_a_full_disk_is_one_message_and_the_next_start_continues(home: Path, spec: Path, small_disk: Path) -> None:
    child = start(spec)
    try:
        wait_for("pause", lambda: paused(home))
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 22, output
        assert "it continues" in output
        kept = {row["id"] for row in rows(home, "samples.jsonl")}
        enlarge(small_disk)
        child = start(spec)
        ended_well(child, home, kept)
    finally:
        child.kill()
        child.communicate()
