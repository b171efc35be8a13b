"""Send a dataset while it is still being sealed. What the node has is not sent; a cut upload goes on where it stopped.

Requests are posted one after the other and answered in their order, so the node verifies one segment while the next is on its
way, and a slow link is never idle. What is not answered when the connection breaks is asked about over the next one. Nothing of
a dataset is visible on the node before its last segment is verified and its manifest committed.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import tenacity

from campaigns.sync.remote import Node
from campaigns.sync.seal import SealedDataset, Sealing
from campaigns.sync.segments import SealedSegment, remove
from campaigns.sync.transport import STALL_S, open_source
from config.contracts.wire import (
    COMMIT_DATASET,
    HAVE,
    RECEIVE,
    CommitDatasetArgs,
    DatasetResult,
    HaveArgs,
    ReceiveArgs,
    SegmentStatus,
)
from config.errors import NodeUnreachable, TransferError

ATTEMPTS = 5  # connections lost, one after the other, without a byte of progress
LONGEST_WAIT_S = 10.0
WINDOW = 4  # segments that may be on their way or being verified
OnProgress = Callable[[int, int], None]  # bytes done, bytes in all (a guess until all is sealed)


@dataclass(frozen=True)
class PushResult:
    """Packed sizes: `sent_bytes` went over the wire (what began again counts twice), `skipped_bytes` were there before."""

    dataset_id: str
    rows: int
    sent_bytes: int
    skipped_bytes: int
    new: bool
    seconds: float = 0.0


def push(node: Node, data: "SealedDataset | Sealing", on_progress: OnProgress) -> PushResult:
    """Send what the node lacks and commit the dataset.

    Raises:
        TransferError: a segment arrived wrong twice, or the node refuses it.
        NodeUnreachable: the connection was lost too often; the same push goes on later.
        StoreCorrupt, StoreError: it cannot be sealed.
    """
    begin = monotonic()
    pushing = _Pushing(node, data, on_progress)
    with node.alone():
        try:
            result = pushing.run()
        except BaseException:
            node.close()  # answers may still be on their way
            raise
    wanted = data.manifest.id
    if result.id != wanted:
        raise TransferError(f"{node.name} made the dataset {result.id} of what is {wanted} here", hint="push again")
    return PushResult(result.id, result.rows, pushing.sent, pushing.skipped, result.new, monotonic() - begin)


class _Pushing:
    def __init__(self, node: Node, data: "SealedDataset | Sealing", on_progress: OnProgress) -> None:
        self._node, self._data, self._on_progress = node, data, on_progress
        self._segments = iter(data)
        self._open: deque[SealedSegment] = deque()  # begun and not confirmed, in order
        self._posted: deque[SealedSegment] = deque()  # of these, what was posted over this connection
        self._refused: set[str] = set()
        self._lost = 0  # connections since the last progress
        self._sent: set[str] = set()
        self._done = 0  # bytes of confirmed segments
        self._best = 0  # the most that was ever there
        self.sent = 0
        self.skipped = 0

    def run(self) -> DatasetResult:
        """Until the dataset is there, over as many connections as it takes."""
        for attempt in tenacity.Retrying(
            stop=lambda _: self._lost >= ATTEMPTS,
            wait=lambda _: random.uniform(0.5, 1) * min(LONGEST_WAIT_S, 0.2 * 2**self._lost),
            retry=tenacity.retry_if_exception_type(NodeUnreachable),
            reraise=True,
        ):
            with attempt:
                self._lost += 1
                self._over_one_connection()
                return self._node.call(COMMIT_DATASET, CommitDatasetArgs(manifest=self._data.manifest), STALL_S)
        raise AssertionError("tenacity re-raises the last error")

    def _over_one_connection(self) -> None:
        self._posted.clear()
        again = list(self._open)
        known = self._statuses([*again, *self._data.sealed_before()])
        self._note_progress(sum(known[segment.sha256].offset for segment in again))
        for segment in again:
            self._send(segment, known[segment.sha256])
        for segment in self._segments:
            self._open.append(segment)
            if segment.sha256 not in known and not segment.fresh:
                while self._posted:  # answers come in order
                    self._confirm_oldest()
                known.update(self._statuses([segment]))
            self._send(segment, known.get(segment.sha256) or SegmentStatus(sha256=segment.sha256, present=False))
        while self._posted:
            self._confirm_oldest()

    def _statuses(self, segments: list[SealedSegment]) -> dict[str, SegmentStatus]:
        """What the node has of these segments now. Raises TransferError where it does not say."""
        if not segments:
            return {}
        answer = self._node.call(HAVE, HaveArgs(segments=[segment.segment for segment in segments]), STALL_S)
        known = {status.sha256: status for status in answer.segments}
        if missing := [segment.sha256 for segment in segments if segment.sha256 not in known]:
            raise TransferError(f"{self._node.name} does not say what it has of the segment {missing[0]}")
        return known

    def _note_progress(self, arrived: int) -> None:
        """`arrived` bytes of segments that are not confirmed are there: where they are no more than before, nothing was won."""
        if self._done + arrived > self._best:
            self._best, self._lost = self._done + arrived, 1

    def _send(self, segment: SealedSegment, status: SegmentStatus) -> None:
        if status.present:
            if segment.sha256 not in self._sent:
                self.skipped += segment.packed_bytes
            return self._confirm(segment)
        if segment.sha256 not in self._sent:
            self.skipped += status.offset
        self._post(segment, status.offset)
        while len(self._posted) >= WINDOW:
            self._confirm_oldest()

    def _post(self, segment: SealedSegment, offset: int) -> None:
        there = offset

        def on_bytes(count: int) -> None:
            nonlocal there
            there += count
            self.sent += count
            self._tell(there)

        self._sent.add(segment.sha256)
        with open_source(segment.path) as file:
            file.seek(offset)
            args = ReceiveArgs(segment=segment.segment, offset=offset)
            self._node.post(RECEIVE, args, file, segment.packed_bytes - offset, on_bytes)
        self._posted.append(segment)

    def _confirm_oldest(self) -> None:
        """Wait for the oldest answer; once more from zero where the node refuses what arrived."""
        segment = self._posted.popleft()
        try:
            self._node.reply(RECEIVE, STALL_S)
        except TransferError:
            if segment.sha256 in self._refused:
                remove(segment)  # it may be wrong here
                raise
            self._refused.add(segment.sha256)
            return self._post(segment, 0)
        self._confirm(segment)

    def _confirm(self, segment: SealedSegment) -> None:
        self._open.remove(segment)
        self._done += segment.packed_bytes
        self._note_progress(0)
        self._tell(0)

    def _tell(self, there: int) -> None:
        """Progress, with `there` bytes of the segment that is on its way."""
        done = self._done + sum(segment.packed_bytes for segment in self._posted) + there
        self._on_progress(done, max(done, self._data.packed_bytes))
