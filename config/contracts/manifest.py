"""Sealed data: segments named by their content, and the manifest that makes a dataset of them."""

from typing import Annotated, Literal

from pydantic import Field

from config.contracts.base import Tolerant, content_id
from config.contracts.names import Portable

DataKind = Literal["samples", "pairs"]
SHA256 = r"^[0-9a-f]{64}$"
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$"  # campaigns, datasets, nodes, jobs: never a path or a shell word


class Segment(Tolerant):
    """Whole JSONL lines, compressed with zstd. `sha256` and `packed_bytes` are of the packed bytes, `bytes` is unpacked."""

    sha256: str = Field(pattern=SHA256)
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1, le=2**40)
    packed_bytes: int = Field(ge=1)


class DatasetManifest(Tolerant):
    """The parts of a dataset, in order. Its id is made of their names alone, so the same segments are the same dataset."""

    name: Annotated[str, Field(pattern=NAME), Portable]
    kind: DataKind = "samples"
    campaigns: list[Annotated[str, Field(pattern=NAME), Portable]]
    segments: list[Segment]

    @property
    def id(self) -> str:
        return content_id({"kind": self.kind, "segments": [segment.sha256 for segment in self.segments]})

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)
