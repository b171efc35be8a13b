"""Campaigns of several processes on one Gemini key stay under its limits together; the server counts from outside.

The window of a minute is the real one. So that no test waits for it, the shared ledger is filled beforehand with calls that were
started most of a minute ago; tests/bench/bench_shared_rpm.py does without.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agents.rates import Rates
from tests.bench.mock import Mock
from tests.fakes.waiting import wait_for

pytestmark = pytest.mark.integration

WINDOW_S = 61.5
HAFS = [sys.executable, "-m", "tests.fakes.echo_domain"]
SPEC = """
name = "{name}"
target = {target}
domains = {{ echo = 1.0 }}

[lanes.flash]
provider = "gemini"
model = "m"
base_url = "{url}"
{limit}
"""


class Shared:
    """Campaigns on one key at one server."""

    def __init__(self, home: Path, folder: Path, url: str, limit: str) -> None:
        self._home, self._folder, self._url, self._limit = home, folder, url, limit

    def spec(self, name: str, target: int) -> Path:
        path = self._folder / f"{name}.toml"
        path.write_text(SPEC.format(name=name, target=target, url=self._url, limit=self._limit))
        return path

    @contextmanager
    def campaign(self, name: str, target: int = 10_000) -> "Iterator[subprocess.Popen[str]]":
        """A campaign as long as the block lasts."""
        environment = {**os.environ, "GEMINI_API_KEY": "one-key-for-all"}
        command = [*HAFS, "campaign", "start", str(self.spec(name, target))]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            yield child
        finally:
            child.kill()
            child.communicate()

    def calls(self, name: str) -> int:
        path = self._home / "training" / name / "calls.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def idle(self, name: str) -> str:
        """The recorded reason why the campaign's lane starts no call."""
        path = self._home / "training" / name / "live.json"
        live: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"lanes": []}
        return str(live["lanes"][0]["idle"]) if live["lanes"] else ""

    def ledger(self) -> Path:
        """The ledger, which a first campaign has made."""
        [path] = (self._home / "limits").glob("*/rates")
        return path


def finish(*children: "subprocess.Popen[str]") -> None:
    for child in children:
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 0, said


def test_three_campaigns_start_no_more_calls_a_minute_than_their_key_allows(home: Path, tmp_path: Path) -> None:
    """Each would like more than there is; what is left out says why it waits. One is killed: what it did stays counted,
    and so does what it was about to do, at most as much as it has slots.
    """
    rpm, slots = 60, 6
    with Mock(LAT=0.5, RPM=rpm) as mock:
        shared = Shared(home, tmp_path, mock.url, f"rpm = {rpm}\nslots = {slots}")
        names = ["a", "b", "c"]
        with shared.campaign("a") as first, shared.campaign("b"), shared.campaign("c"):
            wait_for("call of each", lambda: all(shared.calls(name) for name in names))
            first.send_signal(signal.SIGKILL)
            first.wait()
            wait_for("end of the minute's calls", lambda: [shared.idle(name) for name in names[1:]] == ["rate", "rate"])
            with shared.campaign("d", 1):
                wait_for("reason of one that comes late", lambda: shared.idle("d") == "rate")
        seen = mock.get("/stats")
    assert rpm - slots <= seen["n"] <= rpm
    assert (seen["ok"], seen.get("over_rpm", 0), seen.get("429", 0)) == (seen["n"], 0, 0)
    assert min(shared.calls(name) for name in names) > 0, "nobody starved"


def test_as_the_window_slides_two_share_it_and_the_one_that_is_left_takes_all(home: Path, tmp_path: Path) -> None:
    rpm, a_second = 72, 12
    with Mock(LAT=0.05) as mock:
        shared = Shared(home, tmp_path, mock.url, f"rpm = {rpm}\nslots = 8")
        with shared.campaign("before", 1) as child:
            finish(child)
        ledger = shared.ledger()
        ledger.unlink()
        now = time.monotonic()
        # The window is full; from 4 s on, when both have surely started, 12 calls a second leave it, for 6 s.
        past = Rates(rpm, None, None, ledger=ledger)
        assert all(past.claim(now - WINDOW_S + 4 + number / a_second, 1) for number in range(rpm))
        with shared.campaign("a") as first, shared.campaign("b"):
            wait_for("call of each", lambda: shared.calls("a") and shared.calls("b"))
            before = [shared.calls("a"), shared.calls("b")]
            wait_for("calls", lambda: shared.calls("a") + shared.calls("b") >= sum(before) + rpm // 3)
            shares = [shared.calls(name) - known for name, known in zip("ab", before, strict=True)]
            assert min(shares) >= 0.2 * sum(shares), f"of {sum(shares)} calls one had only {min(shares)}"
            first.kill()
            first.wait()
            wait_for("rest of the minute", lambda: mock.get("/stats")["n"] >= 1 + rpm)
            assert time.monotonic() >= now + 4 + (rpm - 1) / a_second, "all of them within the limit"
            wait_for("their answers", lambda: mock.get("/stats")["ok"] >= 1 + rpm)
            wait_for("reason", lambda: shared.idle("b") == "rate")


def test_tokens_a_minute_are_shared_too(home: Path, tmp_path: Path) -> None:
    """Most of the limit is used, and no more than that, although no process knows what the others' calls will use."""
    tpm = 6000
    with Mock(LAT=0.5, WORDS=60) as mock:  # about 90 tokens a call, estimated as 104
        shared = Shared(home, tmp_path, mock.url, f"tpm = {tpm}\nslots = 6")

        def used() -> int:
            return sum(tokens(home / "training" / name / "calls.jsonl") for name in ("a", "b"))

        with shared.campaign("a"), shared.campaign("b"):
            wait_for("use of the limit", lambda: used() >= 0.8 * tpm)
            wait_for("reason", lambda: [shared.idle(name) for name in ("a", "b")] == ["rate", "rate"])
            wait_for("rows", lambda: mock.get("/stats")["n"] == shared.calls("a") + shared.calls("b"))
        assert used() <= tpm
        assert min(shared.calls("a"), shared.calls("b")) > 0


def tokens(calls: Path) -> int:
    rows = [json.loads(line) for line in calls.read_bytes().split(b"\n")[:-1]] if calls.exists() else []
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
