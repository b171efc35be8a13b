"""Sealed data: the same rows are the same dataset, whole lines only, nothing twice."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns.sync import sealed_before as module
from campaigns.sync.seal import SealedDataset, Sealing, seal
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
    assert segment.sha256 == hashlib.sha256(sealed.files[0].read_bytes()).hexdigest()
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
    full = [segment for segment in second.segments[:-1] if segment != first.segments[-1]]
    assert all(2000 <= segment.bytes < 2000 + 400 for segment in full)


def grow(path: Path, first: int, last: int) -> None:
    with path.open("ab") as file:
        file.write(b"".join(sample(str(number)) for number in range(first, last)))


def test_of_a_file_that_grew_only_the_new_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 20_000)
    path = tmp_path / "a.jsonl"
    grow(path, 0, 200)
    seal([("a", path)], "samples", "set", tmp_path / "out")
    first = seal([("a", path)], "samples", "set", tmp_path / "out")
    with path.open("r+b") as file:  # far from the end of a range: only reading it again would show it
        file.seek(5000)
        file.write(b"\0" * 10)
    grow(path, 199, 240)
    second = seal([("a", path)], "samples", "set", tmp_path / "out")
    assert second.segments[: len(first.segments)] == first.segments and not any(each.fresh for each in first.segments)
    new = second.segments[len(first.segments) :]
    assert [each.segment.rows for each in new] == [40] and all(each.fresh for each in new)
    assert second.duplicates == 1 and second.manifest.rows == 240


@pytest.mark.parametrize("edit", ["replaced", "shortened", "shifted", "cut"])
def test_a_file_that_was_edited_is_sealed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: str) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 5000)
    path = tmp_path / "a.jsonl"
    grow(path, 0, 100)
    seal([("a", path)], "samples", "set", tmp_path / "out")
    rows = path.read_bytes().splitlines(keepends=True)
    if edit == "replaced":
        rows[5] = sample("5", "It loads X.")
        (tmp_path / "new").write_bytes(b"".join(rows))
        (tmp_path / "new").replace(path)
    elif edit == "shortened":
        del rows[3]
        path.write_bytes(b"".join(rows))
    elif edit == "shifted":
        rows[3] = sample("3", "It loads A, says the manual.")
        path.write_bytes(b"".join(rows))
    else:
        del rows[60:]
        path.write_bytes(b"".join(rows))
    sealed = seal([("a", path)], "samples", "set", tmp_path / "out")
    assert unpacked(sealed) == b"".join(rows)
    assert sealed.manifest.id == seal([("a", path)], "samples", "set", tmp_path / "elsewhere").manifest.id


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_packed_file_that_is_gone_or_short_is_packed_again(tmp_path: Path, damage: bytes | None) -> None:
    grow(tmp_path / "a.jsonl", 0, 50)
    first = seal([("a", tmp_path / "a.jsonl")], "samples", "set", tmp_path / "out")
    first.files[0].unlink() if damage is None else first.files[0].write_bytes(damage)
    second = seal([("a", tmp_path / "a.jsonl")], "samples", "set", tmp_path / "out")
    assert unpacked(second) == (tmp_path / "a.jsonl").read_bytes()
    assert second.manifest.id == first.manifest.id


def test_a_line_number_counts_what_was_sealed_before(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(sample("1") + b"\n" + sample("2"))
    seal([("a", path)], "samples", "set", tmp_path / "out")
    with path.open("ab") as file:
        file.write(sample("3") + b"nonsense\n")
    with pytest.raises(StoreCorrupt, match=r"a\.jsonl:5: not a Sample"):
        seal([("a", path)], "samples", "set", tmp_path / "out")


def test_small_segments_are_sealed_again_as_one_and_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 200_000)
    monkeypatch.setattr(module, "SMALL", (3000, 25_000, 200_000))
    path, sent, most = tmp_path / "a.jsonl", 0, 0
    for number in range(0, 800, 4):
        grow(path, number, number + 4)
        sealed = seal([("a", path)], "samples", "set", tmp_path / "out")
        assert unpacked(sealed) == path.read_bytes()
        sent += sum(each.segment.bytes for each in sealed.segments if each.fresh)
        most = max(most, len(sealed.segments))
    assert most <= 22 and sent < 4 * path.stat().st_size


@pytest.mark.parametrize(
    ("sizes", "new", "stay"),
    [
        ([], 5, 0),
        ([16 << 20] * 60, 2**20, 60),
        ([16 << 20, 9000], 2**20, 2),
        ([16 << 20] + [1000] * 7, 1000, 1),
        ([1 << 20] + [1000] * 6, 1000, 7),
        ([1 << 20] * 7 + [1000] * 7, 1000, 7),
        ([1 << 20] * 7 + [200_000] * 7, 200_000, 0),
        ([1 << 20] * 6 + [200_000] * 7, 200_000, 6),
    ],
)
def test_which_segments_stay(sizes: list[int], new: int, stay: int) -> None:
    assert module.kept(sizes, new) == stay


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


def test_an_id_is_the_same_however_its_line_is_written(tmp_path: Path) -> None:
    rows = [json.loads(sample(id_)) for id_ in ('quoted "id"', "back\\slash", "ä", "plain")]
    ways = [
        "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows),
        "".join(json.dumps(row) + "\n" for row in rows),
        "".join(json.dumps(dict(reversed(row.items()))) + "\r\n" for row in rows),
    ]
    for name, text in zip("abc", ways, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(text, newline="")
    for order in ("abc", "bca", "cab"):
        parts = [(name, tmp_path / f"{name}.jsonl") for name in order]
        sealed = seal(parts, "samples", "set", tmp_path / f"out-{order}")
        assert (sealed.manifest.rows, sealed.duplicates) == (4, 8)


def test_what_is_sealed_to_its_end_can_still_be_sent(tmp_path: Path) -> None:
    grow(tmp_path / "a.jsonl", 0, 50)
    with Sealing([("a", tmp_path / "a.jsonl")], "samples", "set", tmp_path / "out") as sealing:
        sealed = sealing.finish()
        assert list(sealing) == list(sealed) and len(sealed.segments) == 1
        assert sealing.packed_bytes == sealed.packed_bytes and sealing.manifest == sealed.manifest


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
