"""Seal campaigns into segments that never change.

A segment holds whole lines, byte for byte as the campaign wrote them, and is named by the SHA-256 of its packed bytes. What was
sealed once stays as it is, so the same campaigns give the same dataset id, and of a campaign that has only grown nothing is read
but what is new (`campaigns.sync.sealed_before`). Of a line that begins with its id and ends as an object does only the id is
looked at; any other, and one in many, is read as a whole. The node reads them all when it trains.

Reading, packing on two threads, and sending (whoever iterates) go side by side. Memory: what zstd needs, and
about 90 bytes a row.
"""

import threading
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Self, TypeAlias

from pydantic import ValidationError

from campaigns.sync import sealed_before
from campaigns.sync.sealed_before import Range
from campaigns.sync.segments import Rows, SealedSegment, pack, unpack
from config.contracts.manifest import DataKind, DatasetManifest
from config.contracts.sample import PreferencePair, Sample
from config.errors import StoreCorrupt, StoreError

LEVEL = 1  # zstd's; packs about 350 MB/s on one core, and below it the size grows faster than the speed
SMALLER = 3  # its level while the link is slow and does not wait for packing: a tenth smaller at twice the work
SLOW_LINK_S = 0.25  # for sending one segment: less than about 150 Mbit/s
LIKELY_RATIO = 0.3  # of packed bytes to lines
PACKERS = 2
AHEAD = 4  # segments that are packed before they are taken: so many may be packed at a level that does not suit the link
READ_BYTES = 2**20
_Ready: TypeAlias = Future[SealedSegment]


_BEGIN, _END = b'{"id":"', b"}\n"  # of a row as campaigns write it
_ROWS: dict[DataKind, type[Sample] | type[PreferencePair]] = {"samples": Sample, "pairs": PreferencePair}


@dataclass(frozen=True)
class SealedDataset:
    """`segments` in the manifest's order. `torn`: files whose unfinished last line was left out."""

    manifest: DatasetManifest
    segments: tuple[SealedSegment, ...]
    duplicates: int = 0
    torn: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[SealedSegment]:
        return iter(self.segments)

    def sealed_before(self) -> tuple[SealedSegment, ...]:
        return self.segments

    @property
    def packed_bytes(self) -> int:
        return sum(segment.packed_bytes for segment in self.segments)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(segment.path for segment in self.segments)


def seal(campaigns: Sequence[tuple[str, Path]], kind: DataKind, name: str, out: Path) -> SealedDataset:
    """Make a dataset called `name` of the JSONL files of `campaigns`, its segments below `out`.

    A row whose id came before, in this or an earlier campaign, falls out. No segment spans two campaigns.

    Raises:
        StoreCorrupt: a whole line is no row of this kind; file and line are named.
        StoreError: a file cannot be read, or there is no row at all.
    """
    with Sealing(campaigns, kind, name, out) as sealing:
        return sealing.finish()


class Sealing:
    """A dataset in the making: while the block lasts, its segments are packed, and iterating gives them in order.

    Raises:
        StoreCorrupt, StoreError, DiskFull: as `seal`, when it is entered and while it is iterated.
    """

    def __init__(self, campaigns: Sequence[tuple[str, Path]], kind: DataKind, name: str, out: Path) -> None:
        self._campaigns, self._kind, self._name, self._out = campaigns, kind, name, out
        self._files: list[_File] = []
        self._ready: SimpleQueue[_Ready | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._packers = ThreadPoolExecutor(PACKERS, "pack")
        self._reader = ThreadPoolExecutor(1, "read")
        self._room = threading.Semaphore(AHEAD)
        self._level = LEVEL  # for the next segments
        self._segments: list[SealedSegment] = []
        self._doubled = 0
        self._ended = False

    def __enter__(self) -> Self:
        for campaign, path in self._campaigns:
            self._files.append(_File(path, sealed_before.record_file(self._out, campaign, self._kind), self._out))
        self._reading = self._reader.submit(self._read_all)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._room.release()
        self._reader.shutdown()
        self._packers.shutdown(cancel_futures=True)

    def sealed_before(self) -> list[SealedSegment]:
        """The segments that are not packed now: there from the start."""
        return [segment for file in self._files for segment in file.record.sealed(self._out)]

    def __iter__(self) -> Iterator[SealedSegment]:
        if self._ended:
            yield from self._segments
            return
        asked = monotonic()
        while (ready := self._ready.get()) is not None:
            self._room.release()
            self._segments.append(ready.result())
            given = monotonic()
            yield self._segments[-1]
            waited_s, asked = given - asked, monotonic()
            self._level = SMALLER if asked - given > max(SLOW_LINK_S, 10 * waited_s) else LEVEL
        self._reading.result()
        self._ended = True

    def finish(self) -> SealedDataset:
        """Wait for all of it."""
        for _ in self:
            continue
        return self.result

    @property
    def packed_bytes(self) -> int:
        """Of all segments; a guess by the first ones until all are there."""
        packed = sum(sealed.packed_bytes for sealed in self._segments)
        if self._ended:
            return packed
        lines, whole = sum(sealed.segment.bytes for sealed in self._segments), sum(file.record.stamp.size for file in self._files)
        return packed + round((packed / lines if lines else LIKELY_RATIO) * max(0, whole - lines))

    @property
    def result(self) -> SealedDataset:
        """When it has been iterated to its end."""
        names = [campaign for campaign, _ in self._campaigns]
        if not self._segments:
            what = f"no rows to send in {', '.join(names) or 'no campaign'}"
            raise StoreError(what, hint="run the campaign first, or name another one")
        segments = [sealed.segment for sealed in self._segments]
        manifest = DatasetManifest(name=self._name, kind=self._kind, campaigns=names, segments=segments)
        doubled = self._doubled + sum(each.duplicates for file in self._files for each in file.record.ranges)
        torn = tuple(file.path for file in self._files if file.record.torn)
        return SealedDataset(manifest, tuple(self._segments), doubled, torn)

    @property
    def manifest(self) -> DatasetManifest:
        return self.result.manifest

    # --- on the thread that reads --------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        try:
            earlier: set[int] = set()  # keys of the campaigns before this one
            for number, file in enumerate(self._files, 1):
                self._read(file, earlier)
                if number < len(self._files):
                    earlier.update(file.record.keys)
        finally:
            self._ready.put(None)

    def _read(self, file: "_File", earlier: set[int]) -> None:
        before = 0
        for segment in file.record.sealed(self._out):
            after = before + segment.segment.rows
            self._give(_packed(segment), file.record.keys[before:after], earlier)
            before = after
        if file.whole:
            return
        blocks: list[tuple[_Block, _Ready]] = []
        try:
            for block in file.new_blocks(self._kind):
                self._room.acquire()
                if self._stopped.is_set():
                    return
                ready = self._pack(Rows(file.path, tuple(block.ranges), len(block.keys)), len(block.keys))
                blocks.append((block, ready))
                self._give(ready, block.keys, earlier)
        finally:
            file.keep([(block, ready.result()) for block, ready in blocks])

    def _pack(self, rows: Rows | bytes, count: int) -> _Ready:
        def run() -> SealedSegment:
            return pack(self._out, rows, count, self._level)

        return self._packers.submit(run)

    def _give(self, ready: _Ready, keys: "array[int]", earlier: set[int]) -> None:
        """Hand out a segment, without the rows that an earlier campaign has."""
        new = [key not in earlier for key in keys] if earlier else []
        if all(new):
            return self._ready.put(ready)
        self._doubled += len(new) - sum(new)
        if any(new):
            rest = b"".join(compress(unpack(ready.result()), new))
            self._ready.put(self._pack(rest, sum(new)))


class _Block:
    """New lines of a file, bytes `start` to `end`: the rows with these keys are at these ranges of bytes."""

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.lines = self.duplicates = 0
        self.print_ = ""
        self.keys = array("Q")
        self.ranges: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return self.end - self.start

    def add(self, size: int, keys: "array[int]") -> None:
        """Lines of so many bytes, all of them rows; none of the `keys` is there yet."""
        self._add_range(self.end, self.end + size)
        self.keys.extend(keys)
        self.end += size
        self.lines += len(keys)

    def skip(self, line: bytes) -> None:
        self.end += len(line)
        self.lines += 1

    def _add_range(self, start: int, end: int) -> None:
        if self.ranges and self.ranges[-1][1] == start:
            start = self.ranges.pop()[0]
        self.ranges.append((start, end))


class _File:
    """One campaign's file with what was sealed of it before. Raises StoreError where it cannot be read."""

    def __init__(self, path: Path, record_file: Path, out: Path) -> None:
        self.path, self._record_file = path, record_file
        with _readable(path):
            self.record, self.whole = sealed_before.load(record_file, path, out)

    def keep(self, blocks: list[tuple[_Block, SealedSegment]]) -> None:
        """Put down what was sealed now."""
        for block, sealed in blocks:
            new = Range(
                start=block.start, end=block.end, lines=block.lines, duplicates=block.duplicates, print_=block.print_,
                segment=sealed.segment,
            )  # fmt: skip
            self.record.add(new, block.keys)
        sealed_before.save(self._record_file, self.record)

    def new_blocks(self, kind: DataKind) -> Iterator[_Block]:
        """What is behind the record's end. Blank lines are no rows; a torn last line is left for the next time."""
        seen, block, self.record.torn = set(self.record.keys), _Block(self.record.end), False
        before = self.record.lines  # lines of the file before the block
        with _readable(self.path), self.path.open("rb", READ_BYTES) as file:
            file.seek(block.start)
            while lines := file.readlines(min(READ_BYTES, max(1, sealed_before.SEGMENT_BYTES - block.size))):
                if not lines[-1].endswith(b"\n"):
                    lines.pop()
                    self.record.torn = True
                self._add(lines, before + block.lines, kind, seen, block)
                if block.size >= sealed_before.SEGMENT_BYTES and block.keys:
                    yield self._closed(block)
                    before, block = before + block.lines, _Block(block.end)
        if block.keys:
            yield self._closed(block)

    def _add(self, lines: list[bytes], before: int, kind: DataKind, seen: set[int], block: _Block) -> None:
        try:
            _ROWS[kind].model_validate_json(lines[0])  # one in many is read as a whole: they are of one kind
            keys = _keys(lines)
        except (ValidationError, IndexError):
            keys = array("Q")  # one of them is blank, or named below
        new = set(keys)
        if len(new) == len(lines) and seen.isdisjoint(new):
            seen |= new
            return block.add(sum(map(len, lines)), keys)
        for number, line in enumerate(lines, before + 1):
            key = _key(line, kind, self.path, number)
            if key is None or key[0] in seen:
                block.duplicates += key is not None
                block.skip(line)
            else:
                seen.add(key[0])
                block.add(len(line), key)

    def _closed(self, block: _Block) -> _Block:
        block.print_ = sealed_before.print_of(self.path, block.end)
        return block


def _keys(lines: list[bytes]) -> "array[int]":
    """The keys of rows as campaigns write them, without parsing them; none at all where a line looks otherwise."""
    ids = [line[len(_BEGIN) : line.find(b'"', len(_BEGIN))] for line in lines]
    plain = all(line.startswith(_BEGIN) and line.endswith(_END) for line in lines) and b"\\" not in b"".join(ids)
    return _hashed(ids) if plain else array("Q")


def _hashed(ids: list[bytes]) -> "array[int]":
    """64 bits of a hash of each id: what a row is told from others by."""
    return array("Q", b"".join([blake2b(id_, digest_size=8).digest() for id_ in ids]))


def _key(line: bytes, kind: DataKind, path: Path, number: int) -> "array[int] | None":
    """The key of a line, read as a whole; None for a blank one. Raises StoreCorrupt where it is no row of this kind."""
    try:
        return _hashed([_ROWS[kind].model_validate_json(line).id.encode()])
    except ValidationError as error:
        if not line.strip():
            return None
        what = f"{path}:{number}: not a {_ROWS[kind].__name__}: {error.errors()[0]['msg']}"
        raise StoreCorrupt(what, hint="look at that line; remove it if it cannot be mended") from error


def _packed(segment: SealedSegment) -> _Ready:
    ready: _Ready = Future()
    ready.set_result(segment)
    return ready


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", hint="check the name of the campaign") from error
