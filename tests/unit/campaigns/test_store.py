"""What the store acknowledged is there after a crash, once and whole."""

import json
import os
from pathlib import Path

import anyio
import pytest

from campaigns.rows import read_lines, read_rows
from campaigns.seen import answer_id
from campaigns.store import Call, Rejected, Store
from config.contracts.sample import Message, Provenance, Sample
from config.errors import ConfigError, SpecChanged, StoreCorrupt, StoreHeld
from tests.fakes.campaign_rows import files, spec, store


def call(number: int, verdict: str = "accepted", answer: str = "1") -> Call:
    made = {"task_id": f"t{number}", "domain": "asm", "cell": "a", "number": number, "verdict": verdict, "cost_usd": 0.5}
    return Call.model_validate({**made, "answer": answer if verdict == "accepted" else ""})


def sample(number: int) -> Sample:
    made = Provenance(campaign="x", task_id=f"t{number}", cell="a", number=number, cost_usd=0.5)
    asked = [Message(role="user", content="q")]
    return Sample(id=f"t{number}", domain="asm", source_id="s", messages=asked, completion="c", provenance=made)


def rejected(number: int) -> Rejected:
    row = sample(number).model_dump()
    return Rejected.model_validate({**row, "reason": "flags"})


def calls() -> list[Call]:
    return list(read_rows(files().calls, Call))


def test_lines_are_there_when_append_returns_and_share_their_fsyncs(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    with store() as opened:
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))

        async def one(number: int) -> None:
            await opened.append(call(number), sample(number))
            assert f'"t{number}"' in files().samples.read_text()
            assert f'"t{number}"' in files().calls.read_text()

        async def many() -> None:
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(one, number)

        anyio.run(many)
    assert [row["id"] for row in read_lines(files().samples)] == [f"t{number}" for number in range(50)]
    assert len(synced) < 20  # 100 lines in two files


def test_a_torn_tail_is_cut_off_and_what_follows_is_whole() -> None:
    with store() as opened:
        anyio.run(opened.append, call(0), sample(0))
    for path in (files().samples, files().calls):
        with open(path, "ab") as file:
            file.write(b'{"id": "to')
    with store() as opened:
        assert [one.task_id for one in calls()] == ["t0"]
        anyio.run(opened.append, call(1), sample(1))
    assert [row["id"] for row in read_lines(files().samples)] == ["t0", "t1"]


@pytest.mark.parametrize("verdict", ["accepted", "rejected"])
def test_a_crash_between_row_and_call_is_mended_with_its_cost(verdict: str) -> None:
    with store() as opened:
        anyio.run(opened.append, call(0), sample(0))
    row = sample(1) if verdict == "accepted" else rejected(1)
    with open(files().samples if verdict == "accepted" else files().rejected, "a") as file:
        file.write(row.model_dump_json() + "\n")
    for _ in range(2):  # mended once, not twice
        with store() as opened:
            assert opened.tally.calls == 2
            assert opened.tally.counts.cost_usd == 1.0
    assert [(one.task_id, one.verdict, one.number, one.cost_usd) for one in calls()] == [
        ("t0", "accepted", 0, 0.5),
        ("t1", verdict, 1, 0.5),
    ]


def test_a_second_process_is_told_who_holds_the_campaign() -> None:
    with store(), pytest.raises(StoreHeld, match=f"process {os.getpid()}"), store():
        pass


def test_a_changed_spec_is_refused_unless_it_only_changes_what_may_change() -> None:
    with store():
        pass
    with store(target=20, budget={"max_usd": 1}):
        assert json.loads(files().spec.read_text())["spec"]["target"] == 20
    with pytest.raises(SpecChanged, match="another sampling"), store(sampling={"temperature": 0.9}):
        pass
    assert json.loads(files().spec.read_text())["spec"]["sampling"]["temperature"] == 0.4


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a\n{"a": 3}\n{"torn')
    with pytest.raises(StoreCorrupt, match="rows.jsonl:2"):
        list(read_lines(path))
    path.write_text('{"a": 1}\n{"torn')
    assert list(read_lines(path)) == [{"a": 1}]


def test_rows_of_another_shape_and_a_foreign_spec_are_named(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text("[]\n")
    with pytest.raises(StoreCorrupt, match="calls.jsonl:1"):
        list(read_lines(path))
    path.write_text('{"task_id": "t"}\n')
    with pytest.raises(StoreCorrupt, match="calls.jsonl:1"):
        list(read_rows(path, Call))
    with store():
        pass
    files().spec.write_text('{"spec": {"name": "x", "of_a_newer_version": 1}}')
    with pytest.raises(StoreCorrupt, match="campaign.json"), store():
        pass


def test_an_answer_is_claimed_once_and_known_after_a_restart() -> None:
    answer = answer_id("s", "c")
    with store() as opened:
        assert opened.claim(answer)
        assert not opened.claim(answer)
    with store() as opened:
        assert opened.claim(answer), "it was claimed but never written"
        anyio.run(opened.append, call(0, answer=answer), sample(0))
        assert not opened.claim(answer)
    with store() as opened:
        assert not opened.claim(answer)


def test_the_spec_is_kept_with_the_folder_that_its_sources_start_at(tmp_path: Path) -> None:
    with Store(files(), spec(), "1", tmp_path / "specs"):
        pass
    record = json.loads(files().spec.read_text())
    assert (record["hafs"], record["folder"]) == ("1", str(tmp_path / "specs"))


def test_a_campaign_cannot_take_the_name_of_a_set_of_pairs() -> None:
    files().path.mkdir(parents=True)
    (files().path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="set of pairs"), store():
        pass
