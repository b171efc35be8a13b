import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from config.contracts.job import JobSpec, TrainJob
from config.contracts.manifest import DatasetManifest, Segment
from config.errors import ConfigError, DiskFull, ProtocolError, StoreError, TransferError
from trainer_node.inbox import Inbox

LINES = b'{"id": "a"}\n{"id": "b"}\n'


def a_segment(lines: bytes = LINES, packed: bytes | None = None, **changes: int) -> tuple[Segment, bytes]:
    packed = zstandard.compress(lines) if packed is None else packed
    segment = Segment(
        sha256=hashlib.sha256(lines).hexdigest(), rows=max(1, lines.count(b"\n")), bytes=len(lines), packed_bytes=len(packed)
    )
    return segment.model_copy(update=dict(changes)), packed


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path)


def upload(inbox: Inbox, segment: Segment, packed: bytes) -> Path:
    part = Path(inbox.have(segment).upload_path)
    part.write_bytes(packed)
    return part


def stored(inbox: Inbox) -> list[Path]:
    folder = inbox.root / "segments"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_segment_is_visible_only_after_its_commit(inbox: Inbox) -> None:
    segment, packed = a_segment()
    before = inbox.have(segment)
    assert not before.present and before.offset == 0
    part = upload(inbox, segment, packed[:7])
    assert inbox.have(segment).offset == 7, "the upload continues here"
    part.write_bytes(packed)
    assert not inbox.have(segment).present and stored(inbox) == []
    assert inbox.commit_segment(segment).present
    (file,) = stored(inbox)
    assert file.read_bytes() == packed and file.name == f"{segment.sha256}.jsonl.zst"
    assert inbox.have(segment).present and not part.exists()
    assert inbox.commit_segment(segment).present, "a lost answer may ask again"


def test_several_frames_are_one_segment(inbox: Inbox) -> None:
    segment, packed = a_segment(packed=zstandard.compress(LINES[:12]) + zstandard.compress(LINES[12:]))
    upload(inbox, segment, packed)
    assert inbox.commit_segment(segment).present


def test_a_short_upload_stays_to_be_continued(inbox: Inbox) -> None:
    segment, packed = a_segment()
    part = upload(inbox, segment, packed[:-3])
    with pytest.raises(TransferError, match=f"{len(packed) - 3} of {len(packed)}"):
        inbox.commit_segment(segment)
    assert part.exists() and inbox.have(segment).offset == len(packed) - 3


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("flipped", "not zstd|SHA-256|unpacked"),
        ("other content", "SHA-256"),
        ("bomb", "more than 24 of 24"),
        ("less", "only 24 of 25"),
        ("garbage behind", "not zstd"),
        ("garbage", "not zstd"),
        ("torn line", "last line is cut off"),
        ("row count", "2 rows, not 3"),
    ],
)
def test_what_is_not_what_was_announced_is_refused_and_deleted(inbox: Inbox, case: str, words: str) -> None:
    segment, packed = {
        "flipped": lambda: a_segment(packed=bytes([*zstandard.compress(LINES)[:-4], 0, 1, 2, 3])),
        "other content": lambda: a_segment(packed=zstandard.compress(LINES.replace(b"a", b"x"))),
        "bomb": lambda: a_segment(packed=zstandard.compress(b"\n" * 2**28)),
        "less": lambda: a_segment(bytes=len(LINES) + 1),
        "garbage behind": lambda: a_segment(packed=zstandard.compress(LINES) + b"garbage"),
        "garbage": lambda: a_segment(packed=b"\0" * 50),
        "torn line": lambda: a_segment(LINES[:-1]),
        "row count": lambda: a_segment(rows=3),
    }[case]()
    part = upload(inbox, segment, packed)
    with pytest.raises(TransferError, match=words):
        inbox.commit_segment(segment)
    assert not part.exists() and stored(inbox) == [] and inbox.have(segment).offset == 0


def test_an_oversized_part_is_begun_anew(inbox: Inbox) -> None:
    segment, packed = a_segment()
    part = upload(inbox, segment, packed + b"more")
    assert inbox.have(segment).offset == 0 and not part.exists()


def test_a_sender_that_still_writes_cannot_change_what_was_verified(inbox: Inbox) -> None:
    segment, packed = a_segment()
    with upload(inbox, segment, packed).open("r+b") as late:
        inbox.commit_segment(segment)
        late.write(b"late bytes of a connection that hung")
    assert stored(inbox)[0].read_bytes() == packed


def test_a_dataset_needs_all_its_segments(inbox: Inbox) -> None:
    (first, packed), (second, _) = a_segment(), a_segment(b"{}\n")
    upload(inbox, first, packed)
    inbox.commit_segment(first)
    whole = DatasetManifest(name="demo", campaigns=["demo"], segments=[first])
    with pytest.raises(TransferError, match="1 of 2 segments"):
        inbox.commit_dataset(whole.model_copy(update={"segments": [first, second]}))
    with pytest.raises(TransferError, match="no segments"):
        inbox.commit_dataset(whole.model_copy(update={"segments": []}))
    done = inbox.commit_dataset(whole)
    assert (done.id, done.rows, done.new) == (whole.id, 2, True)
    assert not inbox.commit_dataset(whole.model_copy(update={"name": "again"})).new, "the same content is the same dataset"
    kept = (inbox.root / "datasets" / f"{whole.id}.json").read_bytes()
    assert DatasetManifest.model_validate_json(kept).name == "demo"


def test_a_job_needs_a_dataset_that_is_here_and_of_its_kind(inbox: Inbox) -> None:
    segment, packed = a_segment()
    upload(inbox, segment, packed)
    inbox.commit_segment(segment)
    id_ = inbox.commit_dataset(DatasetManifest(name="d", campaigns=["d"], segments=[segment])).id
    sft = JobSpec(kind="sft", name="coder", base="x", data=["d"])
    job = TrainJob(spec=sft, dataset_id=id_, code_version="0", nonce="0")
    inbox.require_dataset(job)
    with pytest.raises(TransferError, match="not on this node"):
        inbox.require_dataset(job.model_copy(update={"dataset_id": "f" * 64}))
    for evil in ("../../etc/passwd", "", "F" * 64, "f" * 64 + "\n"):
        with pytest.raises(ProtocolError):
            inbox.require_dataset(job.model_copy(update={"dataset_id": evil}))
    dpo = JobSpec(kind="dpo", name="coder", base="x", data=["d"], start="coder")
    with pytest.raises(ConfigError, match="trains on pairs"):
        inbox.require_dataset(job.model_copy(update={"spec": dpo}))


def test_a_path_in_the_place_of_a_hash_is_refused(inbox: Inbox) -> None:
    segment = a_segment()[0].model_copy(update={"sha256": "../../outside"})  # past the contract's own check
    with pytest.raises(ProtocolError, match="no SHA-256"):
        inbox.have(segment)
    with pytest.raises(ProtocolError):
        inbox.commit_segment(segment)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_costs_nothing(small_disk: Path) -> None:
    inbox = Inbox(small_disk)
    segment, packed = a_segment(os.urandom(150_000).replace(b"\n", b"x") + b"\n")
    part = upload(inbox, segment, packed)
    with pytest.raises(DiskFull) as error:
        inbox.commit_segment(segment)
    assert "free some space" in error.value.hint
    assert part.read_bytes() == packed and stored(inbox) == []
    assert {path.name for path in part.parent.iterdir()} == {part.name, "commit.lock"}, "the half copy is gone"


def test_a_read_only_root_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Inbox(tmp_path / "file").have(a_segment()[0])
