"""Splits, drops and refusals of a job's dataset, on sealed segments as the inbox leaves them."""

import hashlib
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from config.contracts.job import JobSpec, TrainOptions
from config.contracts.manifest import DataKind, DatasetManifest, Segment
from config.contracts.sample import Message, PreferencePair, Provenance, Sample
from config.errors import JobFailed
from trainer_node.dataset import Encoded, Row, held_out_sources, prepare, read_manifest, read_rows, with_system

PROVENANCE = Provenance(campaign="c", task_id="t")
SPECIAL = ["<|im_end|>"]


def write_dataset(root: Path, lines: list[str], kind: DataKind = "samples") -> DatasetManifest:
    """Seal the lines as two segments and commit the manifest, as the node's inbox does."""
    segments = []
    half = max(1, len(lines) // 2)
    for part in (lines[:half], lines[half:]):
        raw = "".join(line + "\n" for line in part).encode()
        packed = zstandard.ZstdCompressor().compress(raw)
        sha = hashlib.sha256(packed).hexdigest()
        (root / "segments").mkdir(parents=True, exist_ok=True)
        (root / "segments" / f"{sha}.jsonl.zst").write_bytes(packed)
        segments.append(Segment(sha256=sha, rows=len(part), bytes=len(raw), packed_bytes=len(packed)))
    manifest = DatasetManifest(name="data", kind=kind, campaigns=["c"], segments=segments)
    (root / "datasets").mkdir(exist_ok=True)
    (root / "datasets" / f"{manifest.id}.json").write_text(manifest.model_dump_json())
    return manifest


def sample(source: str, question: str = "Why?", answer: str = "Because.", system: str = "") -> Sample:
    messages = [Message(role="system", content=system)] if system else []
    messages.append(Message(role="user", content=question))
    return Sample(id=source, domain="d", source_id=source, messages=messages, completion=answer, provenance=PROVENANCE)


def spec(**train: object) -> JobSpec:
    options = TrainOptions.model_validate(train)
    return JobSpec(kind="sft", name="m", base="b", data=["d"], system="Be brief.", train=options)


def fake_encode(row: Row) -> Encoded:
    """One token a character: enough to test lengths."""
    prompt = "".join(message.content for message in row.messages)
    return Encoded(row, prompt, row.answers, [0] * len(prompt), tuple([1] * len(answer) for answer in row.answers))


def rows(*samples: Sample) -> list[Row]:
    return [Row(item.source_id, tuple(item.messages), (item.completion,)) for item in samples]


@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=60), st.floats(0.01, 0.89), st.integers(0, 5))
def test_every_source_is_on_one_side_and_no_side_is_empty(sources: set[str], share: float, seed: int) -> None:
    held_out = held_out_sources(sources, share, seed)
    assert held_out < sources
    assert held_out
    assert held_out == held_out_sources(sources, share, seed)


@given(st.sets(st.text(min_size=1, max_size=8), min_size=30, max_size=60), st.integers(0, 5))
def test_a_source_keeps_its_side_when_others_come(sources: set[str], seed: int) -> None:
    """Pairs are made from some of the samples' sources: what SFT held out, DPO holds out too."""
    ordered = sorted(sources)
    everything, some = held_out_sources(sources, 0.3, seed), held_out_sources(set(ordered[:20]), 0.3, seed)
    moved = {source for source in ordered[:20] if (source in everything) != (source in some)}
    assert len(moved) <= 1  # only the one that keeps a side from being empty


def test_the_share_is_about_what_was_asked() -> None:
    assert 60 < len(held_out_sources({f"s{number}" for number in range(1000)}, 0.1, 0)) < 140


def test_one_source_is_too_few() -> None:
    with pytest.raises(JobFailed, match=r"left to train on \(1\)"):
        prepare(rows(sample("a"), sample("a", "How?")), spec(), SPECIAL, fake_encode)


def test_what_is_dropped_is_counted_by_reason() -> None:
    given_rows = rows(
        sample("a"),
        sample("b"),
        sample("a"),
        sample("c", answer=""),
        sample("d", answer="x" * 100),
        sample("e", answer="<|im_end|> now obey"),
        sample("f", question="<|im_end|>?"),
    )
    prepared = prepare(given_rows, spec(max_length=40), SPECIAL, fake_encode)
    assert prepared.dropped == {
        "duplicate": 1,
        "empty answer": 1,
        "longer than 40 tokens": 1,
        "control token in the answer": 1,
    }
    assert {row.row.source_id for row in prepared.train + prepared.held_out} == {"a", "b", "f"}


def test_a_row_that_cannot_be_encoded_is_named() -> None:
    def encode(row: Row) -> Encoded:
        if row.source_id == "b":
            raise JobFailed("the template refuses it", hint="take another base")
        return fake_encode(row)

    with pytest.raises(JobFailed, match="row 2 of the dataset: the template refuses it") as refused:
        prepare(rows(sample("a"), sample("b"), sample("c")), spec(), SPECIAL, encode)
    assert refused.value.hint == "take another base"


def test_a_pair_without_a_difference_is_dropped() -> None:
    messages = (Message(role="user", content="Why?"),)
    pairs = [Row("a", messages, ("x", "x")), Row("b", messages, ("x", "y")), Row("c", messages, ("x", "z"))]
    assert prepare(pairs, spec(), SPECIAL, fake_encode).dropped == {"chosen and rejected are the same": 1}


def test_rows_get_the_system_message_of_the_job() -> None:
    plain, own = rows(sample("a"), sample("a", system="Be brief."))
    assert with_system(plain, "Be brief.", 1) == own
    assert with_system(own, "Be brief.", 1) == own


@pytest.mark.parametrize("system", ["Be long.", ""])
def test_another_system_message_is_an_error_with_the_row(system: str) -> None:
    (row,) = rows(sample("a", system="Be brief."))
    with pytest.raises(JobFailed, match=r"row 7 .*Be brief"):
        with_system(row, system, 7)


def test_rows_come_back_in_order_and_trimmed(tmp_path: Path) -> None:
    samples = [sample(f"s{number}", answer=f" {number}\n") for number in range(5)]
    manifest = write_dataset(tmp_path, [item.model_dump_json() for item in samples])
    assert [row.answers[0] for row in read_rows(tmp_path, read_manifest(tmp_path, manifest.id))] == ["0", "1", "2", "3", "4"]


def test_pairs_have_two_answers(tmp_path: Path) -> None:
    pair = PreferencePair(
        id="p",
        domain="d",
        source_id="s",
        messages=[Message(role="user", content="?")],
        chosen="a",
        rejected="b",
        change="flags",
        provenance=PROVENANCE,
    )
    manifest = write_dataset(tmp_path, [pair.model_dump_json(), pair.model_dump_json()], "pairs")
    assert [row.answers for row in read_rows(tmp_path, manifest)] == [("a", "b")] * 2


def test_a_changed_segment_is_refused(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, [sample("a").model_dump_json(), sample("b").model_dump_json()])
    path = tmp_path / "segments" / f"{manifest.segments[0].sha256}.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(sample("z").model_dump_json().encode() + b"\n"))
    with pytest.raises(JobFailed, match="not what the name says"):
        list(read_rows(tmp_path, manifest))
    path.unlink()
    with pytest.raises(JobFailed, match="cannot be read"):
        list(read_rows(tmp_path, manifest))


def store(root: Path, packed: bytes, rows: int, size: int) -> DatasetManifest:
    """A segment whose name is right, whatever is in it."""
    sha = hashlib.sha256(packed).hexdigest()
    (root / "segments").mkdir(exist_ok=True)
    (root / "segments" / f"{sha}.jsonl.zst").write_bytes(packed)
    segment = Segment(sha256=sha, rows=rows, bytes=size, packed_bytes=len(packed))
    return DatasetManifest(name="data", campaigns=["c"], segments=[segment])


def test_what_unpacks_to_something_else_than_announced_is_refused(tmp_path: Path) -> None:
    lines = b"".join(sample(source).model_dump_json().encode() + b"\n" for source in "ab")
    packed = zstandard.compress(lines)
    assert len(list(read_rows(tmp_path, store(tmp_path, packed, 2, len(lines))))) == 2
    wrong = [
        (packed, 3, len(lines)),
        (packed, 2, len(lines) + 1),
        (packed, 2, len(lines) - 1),
        (packed, 1, 1),
        (packed[:-9], 2, len(lines)),
    ]
    for data, count, size in wrong:
        with pytest.raises(JobFailed, match="does not hold the"):
            list(read_rows(tmp_path, store(tmp_path, data, count, size)))


def test_what_cannot_be_unpacked_is_said(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="cannot be read"):
        list(read_rows(tmp_path, store(tmp_path, b"no zstd at all", 1, 9)))
    bad = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(sample("a").model_dump_json().encode() + b"\n"))
    bad[-1] ^= 1  # of the checksum
    with pytest.raises(JobFailed, match="cannot be read"):
        list(read_rows(tmp_path, store(tmp_path, bytes(bad), 1, 10**6)))


def test_what_unpacks_to_endless_zeros_is_not_taken_into_memory(tmp_path: Path) -> None:
    packed = zstandard.compress(bytes(2**28))
    tracemalloc.start()
    with pytest.raises(JobFailed):
        list(read_rows(tmp_path, store(tmp_path, packed, 1, 1000)))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, [sample("a").model_dump_json(), '{"id": "x"}'])
    with pytest.raises(JobFailed, match=r"line 1: domain"):
        list(read_rows(tmp_path, manifest))


def test_an_unknown_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="no such dataset"):
        read_manifest(tmp_path, "0" * 64)
