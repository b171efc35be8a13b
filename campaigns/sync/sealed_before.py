"""What was sealed of a campaign file before: byte ranges, each with its segment. A file that has not only grown is sealed anew.

A range is believed while the file is the same one, each range still ends in the bytes that it ended in, and its segment is there.
A segment is never packed again just because the file grew: what is new becomes a small segment of its own. Eight small ones of
a size are sealed again as one, so a row is sent at most a few times, and of small segments there are about twenty at most.
"""

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from campaigns.rows import fingerprint
from campaigns.sync.segments import SealedSegment, segment_file
from config.contracts.base import Tolerant
from config.contracts.manifest import DataKind, Segment
from config.files import write_atomic

SEGMENT_BYTES = 16 * 2**20  # a segment closes with the line that reaches it
SMALL = (2**18, 2**21, SEGMENT_BYTES)  # sizes (in bytes) below which segments are alike
ALIKE = 8  # so many in a row are sealed again as one
RECORD = ".sealed"  # how the name of a record ends


class Range(Tolerant):
    """Bytes `start` to `end` of the file and the `lines` in them. `print_` is a hash of the last bytes before `end`."""

    start: int
    end: int
    lines: int
    duplicates: int = 0
    print_: str = ""
    segment: Segment


class Stamp(Tolerant):
    """Of a file: whoever writes to it changes one of these."""

    inode: int
    size: int
    mtime_ns: int


class _Head(Tolerant):
    stamp: Stamp
    torn: bool
    ranges: list[Range]


@dataclass
class Record:
    """`keys` are those of the rows of all ranges, in order. `torn`: the file ended in an unfinished line."""

    stamp: Stamp
    torn: bool = False
    ranges: list[Range] = field(default_factory=list)
    keys: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def end(self) -> int:
        return self.ranges[-1].end if self.ranges else 0

    @property
    def lines(self) -> int:
        return sum(each.lines for each in self.ranges)

    def add(self, new: Range, keys: "array[int]") -> None:
        self.ranges.append(new)
        self.keys.extend(keys)

    def cut(self, count: int) -> None:
        """Forget all ranges but the first `count`."""
        self.ranges = self.ranges[:count]
        self.keys = self.keys[: sum(each.segment.rows for each in self.ranges)]

    def sealed(self, out: Path) -> list[SealedSegment]:
        return [SealedSegment(each.segment, segment_file(out, each.segment.sha256)) for each in self.ranges]


def load(file: Path, path: Path, out: Path) -> tuple[Record, bool]:
    """What may be believed of the record in `file`, and whether it says all of `path` as it is now.

    Raises:
        OSError: `path` cannot be read.
    """
    stamp = stamp_of(path)
    record = _read(file)
    if record is None or (record.stamp != stamp and not _has_only_grown(record, path, stamp)):
        return Record(stamp), False
    there = [_is_there(out, each) for each in record.ranges]
    record.cut(there.index(False) if False in there else len(there))
    whole = record.stamp == stamp and all(there)
    record.stamp = stamp
    if not whole:
        record.cut(kept([each.segment.bytes for each in record.ranges], stamp.size - record.end))
    return record, whole


def record_file(out: Path, name: str, kind: DataKind) -> Path:
    return out / f"{name}.{kind}{RECORD}"


def named_segments(file: Path) -> set[str]:
    """The names of the files that a record needs."""
    record = _read(file)
    return {segment_file(Path(), each.segment.sha256).name for each in record.ranges} if record else set()


def save(file: Path, record: Record) -> None:
    """Raises DiskFull, StoreError."""
    head = _Head(stamp=record.stamp, torn=record.torn, ranges=record.ranges).model_dump_json().encode()
    write_atomic(file, head + b"\n" + record.keys.tobytes())


def kept(sizes: Sequence[int], new: int) -> int:
    """How many of the segments of these sizes (in bytes) stay as they are when `new` bytes come behind them."""
    stay = len(sizes)
    for limit, below in zip(SMALL, (0, *SMALL), strict=False):
        alike, at = int(below <= new < limit), stay
        while at and sizes[at - 1] < limit:
            at -= 1
            alike += below <= sizes[at]
        if alike >= ALIKE:
            new += sum(sizes[at:stay])
            stay = at
    return stay


def stamp_of(path: Path) -> Stamp:
    stat = path.stat()
    return Stamp(inode=stat.st_ino, size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def print_of(path: Path, end: int) -> str:
    return hashlib.sha256(fingerprint(path, end)).hexdigest()


def _has_only_grown(record: Record, path: Path, stamp: Stamp) -> bool:
    same = record.stamp.inode == stamp.inode and record.stamp.size <= stamp.size
    return same and all(each.print_ == print_of(path, each.end) for each in record.ranges)


def _is_there(out: Path, each: Range) -> bool:
    path = segment_file(out, each.segment.sha256)
    if not path.exists() or path.stat().st_size != each.segment.packed_bytes:
        return False
    os.utime(path)  # for `sync gc`: it is needed
    return True


def _read(file: Path) -> Record | None:
    """None for no record, or one of another version or machine: then all is sealed anew."""
    try:
        head, _, keys = file.read_bytes().partition(b"\n")
        read = _Head.model_validate_json(head)
        record = Record(read.stamp, read.torn, read.ranges, array("Q", keys))
    except (FileNotFoundError, ValidationError, ValueError):
        return None
    rows = sum(each.segment.rows for each in record.ranges)
    return record if len(record.keys) == rows else None
