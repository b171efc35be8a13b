"""Batches of a client that is killed: the server outlives it, and counts what was created and what was billed.

Run as a program this file is the client, a campaign in small:

    python test_batch.py URL FOLDER TASKS PATIENCE_S HANG_AFTER

It asks for what is not stored yet by the batch, and online where the batch lets it down; stores each answer durably; then says
that it is stored. After HANG_AFTER stored answers it stores no more. At the end it writes down what was billed late.
"""

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from agents.providers.gemini_batch import BatchProvider
from agents.providers.gemini_jobs import BatchJobs
from agents.task import Sampling
from config.contracts.sample import Message
from config.errors import ProviderUnavailable
from tests.fakes.served import served
from tests.fakes.waiting import wait_for

pytestmark = pytest.mark.integration

MODEL, TASKS = "gemini-2.5-flash", 12


class Client:
    def __init__(self, url: str, folder: Path, patience_s: float, hang_after: int) -> None:
        self.jobs = BatchJobs(base_url=url, api_key="the-key")
        pace: dict[str, Any] = {"gather_s": 0.2, "settle_s": 0.2, "poll_s": (0.02, 0.1)}
        self.provider = BatchProvider(self.jobs, folder / "batches", patience_s=patience_s, **pace)
        self.folder, self.left = folder, hang_after

    def store(self, name: str, row: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    async def work_on(self, text: str) -> None:
        request = (MODEL, [Message(role="user", content=text)], Sampling())
        lane = "batch"
        try:
            completion = await self.provider.generate(*request)
        except ProviderUnavailable as error:
            assert not error.billable, error
            completion, lane = await self.jobs.generate(*request), "online"
        if self.left == 0:
            await anyio.sleep_forever()
        self.left -= 1
        self.store("stored.jsonl", {"task": text, "answer": completion.text, "lane": lane})
        if lane == "batch":
            self.provider.stored(*request)

    async def run(self, tasks: int) -> None:
        done = {row["task"] for row in rows(self.folder / "stored.jsonl")}
        self.store("starts.jsonl", {})
        async with anyio.create_task_group() as group:
            for text in (f"task {number}" for number in range(tasks)):
                if text not in done:
                    group.start_soon(self.work_on, text)
        for bill in await self.provider.late_bills():
            self.store("bills.jsonl", {"name": bill.display_name, "requests": bill.requests, "tokens": bill.usage.prompt_tokens})
            await self.provider.billed(bill)
        await self.provider.aclose()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Bench:
    """The server's process, and clients of it one after another."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def start(self, *, patience_s: float = 600.0, hang_after: int = -1) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", __file__, self.url, str(self.folder), str(TASKS), str(patience_s), str(hang_after)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill_when(self, what: str, ready: Callable[[], object], **settings: Any) -> None:
        child = self.start(**settings)
        try:
            wait_for(what, lambda: ready() or child.poll() is not None)
            assert child.poll() is None, child.communicate()
        finally:
            child.kill()
            child.communicate()

    def finish(self, **settings: Any) -> None:
        child = self.start(**settings)
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0, output

    def control(self, path: str = "/control", **settings: Any) -> None:
        request = urllib.request.Request(self.url + path, json.dumps(settings).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=10):
            pass

    def witness(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/witness", timeout=10) as reply:
            seen: dict[str, Any] = json.load(reply)
        return seen

    def looks(self) -> int:
        return sum(job["polls"] for job in self.witness()["jobs"])

    def starts(self) -> int:
        return len(rows(self.folder / "starts.jsonl"))

    def has_started(self, before: int) -> bool:
        return self.starts() > before

    def stored(self) -> list[dict[str, Any]]:
        return rows(self.folder / "stored.jsonl")

    def assert_all_stored_once(self) -> None:
        stored = {row["task"]: row["answer"] for row in self.stored()}
        assert stored == {f"task {number}": f"on task {number}" for number in range(TASKS)}
        assert len(self.stored()) == TASKS

    def assert_paid_once(self) -> None:
        seen = self.witness()
        assert set(seen["created"].values()) == {1}, "a batch was created twice"
        assert seen["billed"] == {f"task {number}": 1 for number in range(TASKS)}
        assert seen["online"] == {}

    def journal(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "batches").glob("*"))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with served("gemini_batches", tmp_path) as url:
        yield Bench(tmp_path, url)


@pytest.mark.parametrize("lag", [0, 1])
def test_killed_between_creating_and_recording(bench: Bench, lag: int) -> None:
    bench.control(hold_create=True)
    bench.kill_when("job", lambda: bench.witness()["jobs"])
    bench.control(hold_create=False, hide=lag)
    bench.finish()
    bench.assert_all_stored_once()
    bench.assert_paid_once()
    assert len(bench.witness()["jobs"]) == 1
    assert bench.journal() == []


def test_killed_while_it_waits(bench: Bench) -> None:
    bench.control(polls=0)
    bench.kill_when("look", lambda: bench.looks() >= 1)
    bench.kill_when("look of the second client", lambda: bench.looks() >= 5)
    bench.control(polls=1)
    bench.finish()
    bench.assert_all_stored_once()
    bench.assert_paid_once()
    assert len(bench.witness()["jobs"]) == 1


@pytest.mark.parametrize("handed_out", [0, 5])
def test_killed_with_answers_that_were_not_stored(bench: Bench, handed_out: int) -> None:
    def ended() -> bool:
        return len(bench.stored()) == handed_out and any(name.endswith("answers.jsonl") for name in bench.journal())

    bench.kill_when("answers", ended, hang_after=handed_out)
    bench.finish()
    bench.assert_all_stored_once()
    bench.assert_paid_once()
    assert len(bench.witness()["jobs"]) == 1


def test_killed_at_any_moment(bench: Bench) -> None:
    chance = random.Random(4)
    bench.control(polls=6)
    for _ in range(6):
        before = bench.starts()
        child = bench.start(hang_after=2)
        wait_for("start", partial(bench.has_started, before))
        time.sleep(chance.uniform(0, 0.9))  # a seeded moment in the life of a batch
        child.kill()
        child.communicate()
    bench.finish()
    bench.assert_all_stored_once()
    bench.assert_paid_once()


def test_a_stalled_batch_is_answered_online_and_its_late_bill_reported_once(bench: Bench) -> None:
    bench.control(polls=0)
    bench.finish(patience_s=0.5)
    bench.assert_all_stored_once()
    seen = bench.witness()
    assert [job["cancelled"] for job in seen["jobs"]] == [True]
    assert seen["online"] == {f"task {number}": 1 for number in range(TASKS)}
    assert rows(bench.folder / "bills.jsonl") == []

    bench.control("/end")
    for _ in range(2):
        bench.finish()
        name = seen["jobs"][0]["display_name"]
        assert rows(bench.folder / "bills.jsonl") == [{"name": name, "requests": TASKS, "tokens": 20 * TASKS}]
    assert bench.journal() == []


if __name__ == "__main__":
    client = Client(sys.argv[1], Path(sys.argv[2]), float(sys.argv[4]), int(sys.argv[5]))
    anyio.run(client.run, int(sys.argv[3]))
