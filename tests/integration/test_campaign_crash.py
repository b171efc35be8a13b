"""kill -9, Ctrl-C and a second process against a running campaign; the model server is the outside witness."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SLOTS = 8
TARGET = 150
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


def wait_for(what: str, deadline_s: float, ready: object) -> None:
    end = time.monotonic() + deadline_s
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end, f"no {what} within {deadline_s} s"
        time.sleep(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    port_file = tmp_path / "port"
    program = Path("tests/fakes/fact_ollama.py")
    child = subprocess.Popen([sys.executable, program, port_file], env={**os.environ, "LAT": "0.03", "WRONG": "5"})
    try:
        wait_for("server", 20, port_file.exists)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def spec(tmp_path: Path, server: str) -> Path:
    path = tmp_path / "crash.toml"
    path.write_text(SPEC.replace("URL", server))
    return path


def start(spec: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "campaigns.cli.main", "campaign", "start", str(spec)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def has_grown(child: subprocess.Popen[str], path: Path, before: int) -> bool:
    return child.poll() is not None or (path.exists() and path.stat().st_size > before)


def rows(home: Path, name: str) -> list[dict[str, object]]:
    path = home / "training" / "crash" / name
    data = path.read_bytes() if path.exists() else b""
    assert not data or data.endswith(b"\n"), f"{name} is torn"
    return [json.loads(line) for line in data.splitlines()]


def test_kill_9_loses_nothing_and_doubles_nothing(home: Path, server: str, spec: Path) -> None:
    chance = random.Random(7)
    samples, kills = home / "training" / "crash" / "samples.jsonl", 0
    acknowledged: set[str] = set()
    for _ in range(6):
        before = samples.stat().st_size if samples.exists() else 0
        child = start(spec)
        wait_for("growth", 30, partial(has_grown, child, samples, before))
        time.sleep(chance.uniform(0, 0.15))  # a seeded moment in the middle of the work
        if child.poll() is None:
            child.kill()
            kills += 1
        child.communicate()
        lines = [line for line in samples.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        now = {json.loads(line)["id"] for line in lines}
        assert acknowledged <= now, "a line that was there is gone"
        acknowledged = now
    child = start(spec)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    assert kills >= 3

    accepted, refused, calls = rows(home, "samples.jsonl"), rows(home, "rejected.jsonl"), rows(home, "calls.jsonl")
    assert len(accepted) == TARGET
    ids = [row["id"] for row in accepted + refused]
    assert len(set(ids)) == len(ids)
    assert sorted(ids) == sorted(str(call["task_id"]) for call in calls)
    with urllib.request.urlopen(f"{server}/prompts", timeout=5) as reply:
        answered = len(json.load(reply))
    repeated = answered - len(calls)
    assert repeated <= kills * 2 * SLOTS, f"{repeated} calls were repeated after {kills} kills"


def test_ctrl_c_finishes_what_runs_and_the_next_run_continues(home: Path, server: str, spec: Path) -> None:
    child = start(spec)
    log = home / "logs" / "campaign_crash.log"
    wait_for("log line", 30, lambda: log.exists() and "accepted" in log.read_text())
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
        wait_for("log line", 30, lambda: log.exists() and "accepted" in log.read_text())
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


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small tmpfs: needs root")
def test_a_full_disk_is_one_message_and_the_campaign_continues_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        monkeypatch.setenv("HAFS_HOME", str(small))
        child = start(spec)
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 22, output
        assert "no space left for" in output
        assert "it continues" in output
        kept = {row["id"] for row in rows(small, "samples.jsonl")}
        subprocess.run(["mount", "-o", "remount,size=16m", small], check=True)
        child = start(spec)
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0, output
        ids = [row["id"] for row in rows(small, "samples.jsonl")]
        assert len(ids) == len(set(ids)) == TARGET
        assert kept <= set(ids)
    finally:
        subprocess.run(["umount", small], check=True)
