import hashlib
import io
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from config.contracts.job import JobSpec, TrainJob
from config.contracts.manifest import DatasetManifest, Segment
from config.errors import ConfigError, DiskFull, ProtocolError, StoreError, TransferError
from trainer_node.inbox import Inbox

LINES = b'{"id": "a"}\n{"id": "b"}\n'


def a_segment(lines: bytes = LINES, **changes: int) -> tuple[Segment, bytes]:
    packed = zstandard.compress(lines)
    sha256 = hashlib.sha256(packed).hexdigest()
    segment = Segment(sha256=sha256, rows=max(1, lines.count(b"\n")), bytes=len(lines), packed_bytes=len(packed))
    return segment.model_copy(update=dict(changes)), packed


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    inbox = Inbox(tmp_path)
    yield inbox
    inbox.close()


def receive(inbox: Inbox, segment: Segment, packed: bytes, offset: int = 0) -> None:
    assert inbox.receive(segment, offset, io.BytesIO(packed)).present
    inbox.settle()


def parts(inbox: Inbox) -> list[Path]:
    return sorted((inbox.root / "incoming").glob("*.part"))


def stored(inbox: Inbox) -> list[Path]:
    folder = inbox.root / "segments"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_segment_is_visible_only_when_it_is_whole(inbox: Inbox) -> None:
    segment, packed = a_segment()
    before = inbox.have(segment)
    assert not before.present and before.offset == 0
    with pytest.raises(TransferError, match=f"7 of {len(packed)} bytes have arrived"):
        inbox.receive(segment, 0, io.BytesIO(packed[:7]))
    assert inbox.have(segment).offset == 7 and not inbox.have(segment).present and stored(inbox) == []
    receive(inbox, segment, packed[7:], 7)
    (file,) = stored(inbox)
    assert file.read_bytes() == packed and file.name == f"{segment.sha256}.jsonl.zst"
    assert inbox.have(segment).present and parts(inbox) == []
    assert inbox.receive(segment, 0, io.BytesIO(packed)).present, "a lost answer may send again"


def test_a_node_that_died_before_it_stored_what_it_had_verified_goes_on_without_a_byte(inbox: Inbox) -> None:
    segment, packed = a_segment()
    part = inbox.root / "incoming" / f"{segment.sha256}-0a.part"
    part.parent.mkdir()
    part.write_bytes(packed)
    assert inbox.have(segment).offset == len(packed)
    receive(inbox, segment, b"", len(packed))
    assert stored(inbox)[0].read_bytes() == packed and parts(inbox) == []


def test_every_cut_is_continued_from_where_it_was(inbox: Inbox) -> None:
    segment, packed = a_segment(b"".join(b'{"id": "%d"}\n' % number for number in range(300)))
    for end in range(0, len(packed), 97):
        offset = inbox.have(segment).offset
        with pytest.raises(TransferError):
            inbox.receive(segment, offset, io.BytesIO(packed[offset:end]))
        assert stored(inbox) == [] and len(parts(inbox)) == 1
    offset = inbox.have(segment).offset
    receive(inbox, segment, packed[offset:], offset)
    assert stored(inbox)[0].read_bytes() == packed and parts(inbox) == []


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (lambda packed: bytes([*packed[:-1], packed[-1] ^ 1]), "has SHA-256"),
        (lambda packed: bytes(len(packed)), "has SHA-256"),
        (lambda packed: packed + b"g", "more than"),
        (lambda packed: packed + bytes(2**24), "more than"),
    ],
    ids=["one bit", "zeros", "a byte more", "much more"],
)
def test_what_is_not_what_was_announced_is_refused_and_deleted(inbox: Inbox, sent: Callable[[bytes], bytes], words: str) -> None:
    segment, packed = a_segment()
    with pytest.raises(TransferError, match=words):
        inbox.receive(segment, 0, io.BytesIO(sent(packed)))
    assert parts(inbox) == [] and stored(inbox) == [] and inbox.have(segment).offset == 0


def test_what_is_shorter_than_announced_is_never_whole(inbox: Inbox) -> None:
    segment, packed = a_segment()
    longer = segment.model_copy(update={"packed_bytes": len(packed) + 1})
    with pytest.raises(TransferError, match=f"{len(packed)} of {len(packed) + 1} bytes"):
        inbox.receive(longer, 0, io.BytesIO(packed))
    assert stored(inbox) == []


def test_a_wrong_beginning_is_deleted_with_what_continued_it(inbox: Inbox) -> None:
    segment, packed = a_segment()
    with pytest.raises(TransferError):
        inbox.receive(segment, 0, io.BytesIO(packed[:9][::-1]))
    with pytest.raises(TransferError):
        inbox.receive(segment, inbox.have(segment).offset, io.BytesIO(packed[9:]))
    assert parts(inbox) == [] and inbox.have(segment).offset == 0


class Hanging:
    """A connection that gives its bytes, then has another one served, and ends late."""

    def __init__(self, data: bytes, meanwhile: Callable[[], None]) -> None:
        self._data, self._meanwhile = data, meanwhile

    def read(self, size: int, /) -> bytes:
        if not self._data:
            self._meanwhile()
        data, self._data = self._data, b""
        return data


def test_a_connection_that_hangs_disturbs_no_other(inbox: Inbox) -> None:
    segment, packed = a_segment()
    with pytest.raises(TransferError, match="5 of"):
        inbox.receive(segment, 0, Hanging(packed[:5], lambda: receive(Inbox(inbox.root), segment, packed[3:], 3)))
    assert stored(inbox)[0].read_bytes() == packed


def test_a_dataset_needs_all_its_segments(inbox: Inbox) -> None:
    (first, packed), (second, _) = a_segment(), a_segment(b"{}\n")
    inbox.receive(first, 0, io.BytesIO(packed))
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
    receive(inbox, segment, packed)
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
        inbox.receive(segment, 0, io.BytesIO())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_what_has_come_is_continued(small_disk: Path) -> None:
    inbox = Inbox(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    segment, packed = a_segment(os.urandom(170_000).replace(b"\n", b"x") + b"\n")
    with pytest.raises(DiskFull) as error:
        inbox.receive(segment, 0, Chunks(packed))
    assert "free some space" in error.value.hint
    offset = inbox.have(segment).offset
    assert 0 < offset < len(packed) and stored(inbox) == []
    ballast.unlink()
    (parts(inbox)[0]).write_bytes(packed[: offset // 2])  # room for the copy of what was there
    receive(inbox, segment, packed[offset // 2 :], offset // 2)
    assert stored(inbox)[0].read_bytes() == packed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_takes_nothing_is_said(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, packed = a_segment()
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0a")
    (inbox.root / "incoming").mkdir()
    (inbox.root / "incoming" / f"{segment.sha256}-0a.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        inbox.receive(segment, 0, io.BytesIO(packed))
    assert stored(inbox) == []


class Chunks(io.BytesIO):
    """As a pipe gives them."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(4096)


def test_a_read_only_root_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Inbox(tmp_path / "file").receive(a_segment()[0], 0, io.BytesIO(a_segment()[1]))
