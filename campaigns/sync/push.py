"""Send a sealed dataset. The node verifies what arrives; what it has is not sent again; a cut upload goes on where it stopped.

Nothing of a dataset is visible there before its last segment is verified and its manifest committed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tenacity

from campaigns.sync.remote import Node
from campaigns.sync.seal import SealedDataset
from config.contracts.manifest import Segment
from config.contracts.wire import (
    COMMIT_DATASET,
    COMMIT_SEGMENT,
    HAVE,
    CommitDatasetArgs,
    CommitSegmentArgs,
    HaveArgs,
    SegmentStatus,
)
from config.errors import NodeUnreachable, TransferError

COMMIT_S = 300.0  # the node unpacks and hashes a segment
ATTEMPTS = 5  # connections lost over one segment before the push gives up
OnProgress = Callable[[int, int], None]  # bytes done, bytes in all; done falls back where a segment begins again


@dataclass(frozen=True)
class PushResult:
    """Packed sizes: `sent_bytes` went over the wire (what began again counts twice), `skipped_bytes` were there before."""

    dataset_id: str
    rows: int
    sent_bytes: int
    skipped_bytes: int
    new: bool


def push(node: Node, sealed: SealedDataset, on_progress: OnProgress) -> PushResult:
    """Send what the node lacks and commit the dataset.

    Raises:
        TransferError: a segment arrived wrong twice, or the node refuses it.
        NodeUnreachable: the connection was lost too often; the same push goes on later.
    """
    manifest = sealed.manifest
    pushing = _Pushing(node, sum(segment.packed_bytes for segment in manifest.segments), on_progress)
    statuses = {status.sha256: status for status in node.call(HAVE, HaveArgs(segments=manifest.segments)).segments}
    for segment, path in zip(manifest.segments, sealed.files, strict=True):
        pushing.send(segment, path, statuses[segment.sha256] if segment.sha256 in statuses else pushing.status(segment))
    result = node.call(COMMIT_DATASET, CommitDatasetArgs(manifest=manifest), COMMIT_S)
    if result.id != manifest.id:
        raise TransferError(f"{node.name} made the dataset {result.id} of what is {manifest.id} here", hint="push again")
    return PushResult(result.id, result.rows, pushing.sent, pushing.skipped, result.new)


class _Pushing:
    def __init__(self, node: Node, total: int, on_progress: OnProgress) -> None:
        self._node, self._total, self._on_progress = node, total, on_progress
        self._done = 0  # bytes of the segments that are finished
        self.sent = 0
        self.skipped = 0

    def status(self, segment: Segment) -> SegmentStatus:
        """What the node has of a segment now. Raises TransferError where it does not say."""
        for status in self._node.call(HAVE, HaveArgs(segments=[segment])).segments:
            if status.sha256 == segment.sha256:
                return status
        raise TransferError(f"{self._node.name} does not say what it has of the segment {segment.sha256}")

    def send(self, segment: Segment, path: Path, status: SegmentStatus) -> None:
        """Upload and commit; once more from zero where the node refuses what arrived."""
        self.skipped += segment.packed_bytes if status.present else status.offset
        if not status.present:
            self._upload(segment, path, status)
            try:
                self._commit(segment)
            except TransferError:
                self._upload(segment, path, self.status(segment).model_copy(update={"offset": 0}))
                self._commit(segment)
        self._done += segment.packed_bytes
        self._on_progress(self._done, self._total)

    def _commit(self, segment: Segment) -> None:
        self._node.call(COMMIT_SEGMENT, CommitSegmentArgs(segment=segment), COMMIT_S)

    def _upload(self, segment: Segment, path: Path, status: SegmentStatus) -> None:
        for attempt in tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential_jitter(initial=0.2, max=10),
            retry=tenacity.retry_if_exception_type(NodeUnreachable),
            reraise=True,
        ):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    status = self.status(segment)
                if not status.present and status.offset < segment.packed_bytes:
                    self._upload_once(path, status)

    def _upload_once(self, path: Path, status: SegmentStatus) -> None:
        there = status.offset

        def on_bytes(count: int) -> None:
            nonlocal there
            there += count
            self.sent += count
            self._on_progress(self._done + there, self._total)

        self._node.upload(path, status.upload_path, status.offset, on_bytes)
