"""Sealed data: segments named by their content, and the manifest that makes a dataset of them."""

from typing import Literal

from pydantic import Field

from config.contracts.base import Tolerant, content_id

DataKind = Literal["samples", "pairs"]
SHA256 = r"^[0-9a-f]{64}$"
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$"  # campaigns, datasets, nodes, jobs: never a path or a shell word


class Segment(Tolerant):
    """Whole JSONL lines, compressed with zstd. `sha256` is of the uncompressed lines, `bytes` and `packed_bytes` are sizes."""

    sha256: str = Field(pattern=SHA256)
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    packed_bytes: int = Field(ge=1)


class DatasetManifest(Tolerant):
    """The parts of a dataset, in order. Its id is a hash of content alone, so the same rows are the same dataset."""

    name: str = Field(pattern=NAME)
    kind: DataKind = "samples"
    campaigns: list[str]
    segments: list[Segment]

    @property
    def id(self) -> str:
        return content_id({"kind": self.kind, "segments": [segment.sha256 for segment in self.segments]})

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)
