"""Sealed data: the same rows are the same dataset, whole lines only, nothing twice."""

import hashlib
import io
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns.sync import seal as module
from campaigns.sync.seal import SealedDataset, seal
from config.contracts.sample import Message, PreferencePair, Provenance, Sample
from config.errors import StoreCorrupt, StoreError


def sample(id_: str, text: str = "It loads A.") -> bytes:
    row = Sample(
        id=id_,
        domain="asm",
        source_id=f"s-{id_}",
        messages=[Message(role="user", content="What does LDA do?")],
        completion=text,
        provenance=Provenance(campaign="c", task_id=id_),
    )
    return row.model_dump_json().encode() + b"\n"


def unpacked(sealed: SealedDataset) -> bytes:
    return b"".join(zstandard.ZstdDecompressor().stream_reader(io.BytesIO(file.read_bytes())).read() for file in sealed.files)


def test_what_is_sealed_is_what_was_written(tmp_path: Path) -> None:
    rows = [sample(str(number)) for number in range(50)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    sealed = seal([("a", tmp_path / "a.jsonl")], "samples", "set", tmp_path / "out")
    segment = sealed.manifest.segments[0]
    assert unpacked(sealed) == b"".join(rows)
    assert segment.sha256 == hashlib.sha256(b"".join(rows)).hexdigest()
    assert (segment.rows, segment.bytes) == (50, len(b"".join(rows)))
    assert segment.packed_bytes == sealed.files[0].stat().st_size
    assert sealed.files[0] == tmp_path / "out" / f"{segment.sha256}.jsonl.zst"


def test_sealing_again_gives_the_same_dataset_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(sample(str(number)) for number in range(50)))
    first = seal([("a", tmp_path / "a.jsonl")], "samples", "set", tmp_path / "out")
    before = first.files[0].stat().st_ino
    second = seal([("a", tmp_path / "a.jsonl")], "samples", "another-name", tmp_path / "out")
    assert second.manifest.id == first.manifest.id and second.files == first.files
    assert first.files[0].stat().st_ino == before


def test_a_torn_last_line_is_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(sample("1") + sample("2")[:-9])
    sealed = seal([("a", path)], "samples", "set", tmp_path / "out")
    assert unpacked(sealed) == sample("1") and sealed.torn == (path,)


def test_a_line_that_only_lacks_its_end_is_torn_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(sample("1") + sample("2").rstrip(b"\n"))
    assert seal([("a", path)], "samples", "set", tmp_path / "out").manifest.rows == 1


def test_duplicates_fall_out_across_parts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(sample("1") + sample("2") + sample("1"))
    (tmp_path / "b.jsonl").write_bytes(sample("2") + sample("3"))
    (tmp_path / "c.jsonl").write_bytes(sample("3"))
    parts = [(name, tmp_path / f"{name}.jsonl") for name in "abc"]
    sealed = seal(parts, "samples", "set", tmp_path / "out")
    assert unpacked(sealed) == sample("1") + sample("2") + sample("3")
    assert sealed.duplicates == 3 and sealed.manifest.campaigns == ["a", "b", "c"]


def test_a_campaign_that_grew_keeps_its_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(sample(str(number)) for number in range(50)))
    first = seal([("a", path)], "samples", "set", tmp_path / "out").manifest
    with path.open("ab") as file:
        file.write(b"".join(sample(str(number)) for number in range(50, 70)))
    second = seal([("a", path)], "samples", "set", tmp_path / "out").manifest
    assert len(first.segments) > 3 and second.segments[: len(first.segments) - 1] == first.segments[:-1]
    assert all(2000 <= segment.bytes < 2000 + 400 for segment in second.segments[:-1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=20), min_size=1, max_size=4))
def test_every_id_is_sealed_once_in_order(tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("seal")
    for index, ids in enumerate(parts):
        (folder / f"{index}.jsonl").write_bytes(b"".join(sample(str(id_)) for id_ in ids))
    campaigns = [(f"c{index}", folder / f"{index}.jsonl") for index in range(len(parts))]
    wanted = list(dict.fromkeys(id_ for ids in parts for id_ in ids))
    if not wanted:
        with pytest.raises(StoreError, match="no rows to send in c0"):
            seal(campaigns, "samples", "set", folder / "out")
        return
    sealed = seal(campaigns, "samples", "set", folder / "out")
    assert unpacked(sealed) == b"".join(sample(str(id_)) for id_ in wanted)
    assert sealed.manifest.rows == len(wanted)


@pytest.mark.parametrize("line", [b"{}\n", b"not json\n", b"[1]\n", b'{"id": "\xff"}\n', sample("x")[:-40] + b"\n"])
def test_a_whole_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(sample("1") + b"\n" + line + sample("2"))
    with pytest.raises(StoreCorrupt, match=r"a\.jsonl:3: not a Sample"):
        seal([("a", path)], "samples", "set", tmp_path / "out")


def test_pairs_are_sealed_as_pairs(tmp_path: Path) -> None:
    pair = PreferencePair(
        id="p", domain="asm", source_id="s", messages=[], chosen="a", rejected="b", change="operand",
        provenance=Provenance(campaign="c", task_id="t"),
    )  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(pair.model_dump_json().encode() + b"\n")
    assert seal([("c", path)], "pairs", "set", tmp_path / "out").manifest.kind == "pairs"
    with pytest.raises(StoreCorrupt, match="not a Sample"):
        seal([("c", path)], "samples", "set", tmp_path / "out")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        seal([("a", tmp_path / "nowhere.jsonl")], "samples", "set", tmp_path / "out")
