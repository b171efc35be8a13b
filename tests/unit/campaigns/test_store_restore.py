"""A restart knows what was done: with the index, without it, and from files that a person has edited."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from campaigns import restore, rows
from campaigns.index import INDEX, load
from campaigns.rows import read_blocks, read_lines, since
from campaigns.seen import answer_id
from campaigns.status import CampaignStatus
from campaigns.store import Store
from config.errors import StoreCorrupt
from config.settings import load_settings
from tests.fakes.campaign_rows import VERDICTS, append, files, store

COUNT = 40


def make(first: int = 0, count: int = COUNT, seed: int = 1) -> None:
    chance = random.Random(seed)

    async def fill(opened: Store) -> None:
        for number in range(first, first + count):
            await append(opened, number, chance.choice(VERDICTS))

    with store() as opened:
        anyio.run(fill, opened)


def reopened() -> dict[str, Any]:
    """What a restart knows."""
    with store() as opened:
        return {**opened.tally.dump(), "answers": sorted(slot for slot in opened.tally.answers.slots if slot)}


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def index() -> Path:
    return files().path / INDEX


def test_an_index_is_left_at_the_end_and_says_what_the_files_say() -> None:
    make()
    known = load(files().path, with_answers=True).tally
    assert known.calls == COUNT
    index().unlink()
    assert reopened()["counts"] == {**known.dump()["counts"]}
    assert known.dump() == load(files().path, with_answers=True).tally.dump()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(path.read_bytes()[:-8] + b"12345678"),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"calls": 40', b'"calls": 41')),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        lambda path: path.write_bytes(b"[]\n[]\n"),
    ],
)
def test_an_index_that_is_lost_or_spoilt_costs_time_only(spoil: Callable[[Path], Any]) -> None:
    make()
    before = reopened()
    spoil(index())
    assert load(files().path, with_answers=True).tally.calls == 0, "it was believed"
    assert reopened() == before


def test_what_came_after_the_index_is_counted() -> None:
    make()
    old = index().read_bytes()
    make(COUNT, 30, seed=2)
    before = reopened()
    index().write_bytes(old)
    assert load(files().path, with_answers=True).tally.calls == COUNT
    assert reopened() == before
    assert before["calls"] == COUNT + 30


def test_only_what_came_after_the_index_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    seen: list[int] = []
    monkeypatch.setattr(restore, "read_blocks", lambda *args: (seen.append(args[1]), read_blocks(*args))[1])
    monkeypatch.setattr(restore, "read_lines", lambda *args: (seen.append(args[1]), read_lines(*args))[1])
    reopened()
    sizes = {path.stat().st_size for path in (files().samples, files().rejected, files().calls)}
    assert set(seen) == sizes


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", ["samples", "rejected"])
@pytest.mark.parametrize("missing", [1, 3, 7])
def test_rows_whose_calls_a_crash_swallowed_are_mended(name: str, indexed: bool, missing: int) -> None:
    make()
    before = reopened()
    old, index_then = lines(files().calls), index().read_bytes()
    verdict = "accepted" if name == "samples" else "rejected"
    lost = [number for number, line in enumerate(old) if json.loads(line)["verdict"] == verdict][-missing:]
    cut = min(lost)  # all calls from there on are gone, as they are after a power cut
    files().calls.write_bytes(b"".join(old[:cut]))
    index().write_bytes(index_then) if indexed else index().unlink()
    gone = [json.loads(line) for line in old[cut:]]
    kept = {call["task_id"] for call in gone if call["verdict"] != "failed"}
    with store() as opened:
        assert opened.tally.calls == cut + len(kept)
        assert opened.tally.counts.accepted["asm"] == before["counts"]["accepted"]["asm"]
    assert {json.loads(line)["task_id"] for line in lines(files().calls)[cut:]} == kept
    after = reopened()
    assert after["answers"] == before["answers"]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("which", [0, 5, -1])
def test_a_sample_that_a_person_took_out_is_owed_again(which: int, indexed: bool) -> None:
    make()
    if not indexed:
        index().unlink()
    kept = lines(files().samples)
    gone = json.loads(kept.pop(which))
    files().samples.write_bytes(b"".join(kept))
    with store() as opened:
        assert opened.tally.counts.accepted["asm"] == len(kept)
        assert opened.tally.cells["asm", "a"].accepted == len(kept)
        assert opened.tally.counts.reasons["removed"] == 1
        assert opened.tally.calls == COUNT
        assert not opened.claim(answer_id("s", gone["completion"])), "it was taken out on purpose"
        anyio.run(append, opened, COUNT)
    assert reopened()["counts"]["accepted"]["asm"] == len(kept) + 1


def test_calls_that_a_person_took_out_are_told_by_their_rows() -> None:
    make()
    before = reopened()
    kept = lines(files().calls)
    files().calls.write_bytes(b"".join(kept[:5] + kept[9:]))
    reopened()
    again = [json.loads(line)["task_id"] for line in lines(files().calls)]
    assert len(again) == len(set(again))
    assert reopened()["counts"]["accepted"] == before["counts"]["accepted"]
    assert reopened()["answers"] == before["answers"]


def test_a_lost_calls_file_is_told_by_the_rows() -> None:
    make()
    before = reopened()
    files().calls.unlink()
    after = reopened()
    assert after["counts"]["accepted"] == before["counts"]["accepted"]
    assert after["counts"]["rejected"] == before["counts"]["rejected"]


def test_calls_of_a_version_that_did_not_write_answers_are_told_by_their_rows() -> None:
    make()
    before = reopened()
    index().unlink()
    old = [{**json.loads(line), "answer": ""} for line in lines(files().calls)]
    files().calls.write_text("".join(json.dumps(call) + "\n" for call in old))
    assert reopened() == before


@pytest.mark.parametrize("junk", [b"[]\n", b'{"task_id": "t"}\n', b"{\n", b'1, {"a": 2}\n', b"\n"])
def test_a_line_that_is_no_call_is_named(junk: bytes) -> None:
    make()
    with open(files().calls, "ab") as file:
        file.write(junk)
    with pytest.raises(StoreCorrupt, match=rf"calls.jsonl:{COUNT + 1}"):
        reopened()
    index().unlink()
    with pytest.raises(StoreCorrupt, match=rf"calls.jsonl:{COUNT + 1}"):
        reopened()


def test_rows_that_do_not_say_how_they_were_made_are_named() -> None:
    make()
    with open(files().samples, "ab") as file:
        file.write(b'{"id": "by hand", "source_id": "s", "completion": "c"}\n')
    with pytest.raises(StoreCorrupt, match="by hand does not say how it was made"):
        reopened()


def test_zeros_that_a_power_cut_left_in_a_file_are_cut_off_with_what_follows() -> None:
    make()
    before = reopened()
    with open(files().samples, "ab") as file:
        file.write(b'{"id": "t99"}\n{"id"' + b"\0" * 5000 + b'"}\n{"id": "t98"}\n')
    whole = files().samples.stat().st_size
    files().samples.write_bytes(files().samples.read_bytes().replace(b'{"id": "t99"}\n', b""))
    assert reopened() == before
    assert files().samples.stat().st_size < whole - 5000


def test_status_is_told_by_the_calls_also_while_they_are_written() -> None:
    make()
    status = CampaignStatus(load_settings(), "x")
    assert status.calls == COUNT
    assert status.lanes["l"].ok == status.done + status.rejected["asm"]
    with open(files().calls, "ab") as file:
        file.write(b'{"task_id": "to')
    index().unlink()
    again = CampaignStatus(load_settings(), "x")
    assert (again.accepted, again.reasons, again.cost_usd) == (status.accepted, status.reasons, status.cost_usd)
    assert again.rate is None
    assert again.state == ("complete" if again.done >= 9 else "stopped")


def test_recent_rows_are_found_without_reading_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK", 64)
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(f'{{"time": {second}}}\n' for second in range(500)) + '{"time')
    for moment in (-1, 0, 3.5, 250, 499, 500):
        assert [row["time"] for row in since(path, moment)] == [second for second in range(500) if second >= moment]
    assert list(since(tmp_path / "none", 0)) == []
