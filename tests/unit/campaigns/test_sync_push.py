"""Push against the node's own request handling, with the link cut, answers lost and files spoiled."""

import random
from pathlib import Path

import pytest

from campaigns.sync import sealed_before
from campaigns.sync.push import push
from campaigns.sync.remote import Node
from campaigns.sync.seal import SealedDataset, seal
from config.contracts.sample import Provenance, Sample
from config.errors import TransferError
from tests.fakes.in_process_node import InProcessNode


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SealedDataset:
    """Three segments that do not compress much."""
    monkeypatch.setattr(sealed_before, "SEGMENT_BYTES", 20_000)
    chance = random.Random(0)
    rows = [
        Sample(
            id=str(number), domain="asm", source_id="s", messages=[], completion=chance.randbytes(400).hex(),
            provenance=Provenance(campaign="c", task_id="t"),
        )
        for number in range(55)
    ]  # fmt: skip
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"".join(row.model_dump_json().encode() + b"\n" for row in rows))
    return seal([("c", path)], "samples", "set", tmp_path / "sealed")


@pytest.fixture
def there(tmp_path: Path) -> InProcessNode:
    return InProcessNode(tmp_path / "node")


def ignore(done: int, total: int) -> None:
    """Progress nobody looks at."""


def total(sealed: SealedDataset) -> int:
    return sum(segment.packed_bytes for segment in sealed.manifest.segments)


def test_a_push_arrives_whole(sealed: SealedDataset, there: InProcessNode) -> None:
    seen: list[tuple[int, int]] = []
    result = push(Node("box", there.dial), sealed, lambda done, all_: seen.append((done, all_)))
    assert (result.dataset_id, result.rows, result.new) == (sealed.manifest.id, 55, True)
    assert (result.sent_bytes, result.skipped_bytes) == (total(sealed), 0)
    assert seen == sorted(seen) and seen[-1] == (total(sealed), total(sealed))
    for file, segment in zip(sealed.files, sealed.manifest.segments, strict=True):
        assert (there.root / "segments" / f"{segment.sha256}.jsonl.zst").read_bytes() == file.read_bytes()
    assert (there.root / "datasets" / f"{sealed.manifest.id}.json").exists()


def test_a_second_push_sends_nothing(sealed: SealedDataset, there: InProcessNode) -> None:
    push(Node("box", there.dial), sealed, ignore)
    again = push(Node("box", there.dial), sealed, ignore)
    assert (again.sent_bytes, again.skipped_bytes, again.new) == (0, total(sealed), False)


@pytest.mark.parametrize("cut", [0, 1, 5000])
def test_a_cut_upload_goes_on_where_it_stopped(sealed: SealedDataset, there: InProcessNode, cut: int) -> None:
    there.cut_upload_after = cut
    result = push(Node("box", there.dial), sealed, ignore)
    assert result.sent_bytes == total(sealed) and there.dialled == 2


def test_a_cut_after_the_last_byte_costs_no_byte(sealed: SealedDataset, there: InProcessNode) -> None:
    there.cut_upload_after = sealed.manifest.segments[0].packed_bytes
    assert push(Node("box", there.dial), sealed, ignore).sent_bytes == total(sealed)


def test_a_push_that_died_is_continued_by_the_next(sealed: SealedDataset, there: InProcessNode) -> None:
    first = sealed.manifest.segments[0]
    part = there.root / "incoming" / f"{first.sha256}-0a.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(sealed.files[0].read_bytes()[:7000])
    result = push(Node("box", there.dial), sealed, ignore)
    assert (result.sent_bytes, result.skipped_bytes) == (total(sealed) - 7000, 7000)


def test_a_spoiled_segment_is_sent_once_more_from_zero(sealed: SealedDataset, there: InProcessNode) -> None:
    there.spoil = lambda data: b"\0" * len(data)
    result = push(Node("box", there.dial), sealed, ignore)
    assert result.sent_bytes == total(sealed) + sealed.manifest.segments[0].packed_bytes
    assert result.new


def test_a_part_that_begins_wrong_is_begun_again(sealed: SealedDataset, there: InProcessNode) -> None:
    first = sealed.manifest.segments[0]
    part = there.root / "incoming" / f"{first.sha256}-0a.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 7000)
    assert push(Node("box", there.dial), sealed, ignore).new


def test_a_segment_that_is_wrong_here_is_refused_and_nothing_becomes_visible(sealed: SealedDataset, there: InProcessNode) -> None:
    sealed.files[1].write_bytes(sealed.files[0].read_bytes()[: sealed.manifest.segments[1].packed_bytes])
    with pytest.raises(TransferError):
        push(Node("box", there.dial), sealed, ignore)
    assert not (there.root / "datasets").exists()


@pytest.mark.parametrize("verb", ["have", "receive", "commit_dataset", "ping"])
def test_a_lost_answer_is_asked_again(sealed: SealedDataset, there: InProcessNode, verb: str) -> None:
    there.lose_answer_of = verb
    assert push(Node("box", there.dial), sealed, ignore).sent_bytes == total(sealed)
    assert there.dialled == 2
