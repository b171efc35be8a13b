"""The wire between laptop and node: one line of ASCII JSON a request, one a reply, over stdin and stdout of `hafs-node rpc`.

Arguments and results are the models below; a verb is described by a `Verb`, so both sides agree by construction.
"""

from typing import Any, Generic, TypeVar

from pydantic import Field

from config.contracts.base import Tolerant
from config.contracts.gpu import GpuReading
from config.contracts.job import JobError, JobView, TrainJob
from config.contracts.manifest import SHA256, DatasetManifest, Segment

PROTOCOL_VERSION = 1
MAX_LINE_BYTES = 8 * 2**20


class Request(Tolerant):
    version: int = PROTOCOL_VERSION
    verb: str
    args: dict[str, Any] = {}


class Reply(Tolerant):
    """Either `result` or `error`; `error.code` is the name of a class in config.errors."""

    version: int = PROTOCOL_VERSION
    result: dict[str, Any] | None = None
    error: JobError | None = None


class Nothing(Tolerant):
    pass


class Pong(Tolerant):
    hafs: str
    protocol: int
    root: str
    daemon: bool
    platform: str


class HaveArgs(Tolerant):
    segments: list[Segment]


class SegmentStatus(Tolerant):
    """`present`: verified and in the store. Else `upload_path` is where the packed bytes go, `offset` how many are there."""

    sha256: str
    present: bool
    upload_path: str = ""
    offset: int = 0


class HaveResult(Tolerant):
    segments: list[SegmentStatus]


class CommitSegmentArgs(Tolerant):
    segment: Segment


class CommitDatasetArgs(Tolerant):
    manifest: DatasetManifest


class DatasetResult(Tolerant):
    id: str
    rows: int
    new: bool


class SubmitArgs(Tolerant):
    job: TrainJob


class SubmitResult(Tolerant):
    job: JobView
    new: bool


class JobArgs(Tolerant):
    """`job` is an id, the start of one, or a model name (its newest job)."""

    job: str = ""


class JobsResult(Tolerant):
    jobs: list[JobView]


class ReadArgs(Tolerant):
    """Read a growing file from `offset`; wait up to `wait_s` for something new."""

    job: str
    attempt: int = 0  # 0: the newest
    offset: int = Field(0, ge=0)
    wait_s: float = Field(0, ge=0, le=30)


class ReadResult(Tolerant):
    """`text` ends at a whole line unless the attempt has ended. `offset` is where the next read begins."""

    text: str
    offset: int
    attempt: int
    job: JobView


class ModelVersion(Tolerant):
    """One registered version. `folder` holds adapter/, adapter.gguf, job.json, metrics.jsonl, training_stats.json."""

    tag: str
    alias: str = ""
    kind: str
    job: str
    base: str
    dataset_id: str
    created_at: float
    perplexity_base: float | None = None
    perplexity_tuned: float | None = None


class ModelsResult(Tolerant):
    models: list[ModelVersion]


class ArtifactsArgs(Tolerant):
    model: str  # hafs-coder, or hafs-coder:v1


class Artifact(Tolerant):
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")
    path: str
    bytes: int
    sha256: str = Field(pattern=SHA256)


class ArtifactsResult(Tolerant):
    tag: str
    files: list[Artifact]


class RuntimeArgs(Tolerant):
    """Ask for a model server on the node. `gguf` (a file or package:NAME) is registered there if it is absent: as `model`, or,
    where that is empty, as hafs-base:<the first 12 digits of the file's SHA-256>, the name under which jobs use it too.
    """

    model: str = ""
    gguf: str = ""


class RuntimeResult(Tolerant):
    """`model` is the name that `gguf` has there."""

    url: str
    model: str = ""
    embedded: bool
    version: str
    started: bool


class GpuResult(Tolerant):
    """`reading` None: the node cannot see its GPU, and `missing` says why."""

    reading: GpuReading | None = None
    missing: str = ""


A = TypeVar("A", bound=Tolerant)
R = TypeVar("R", bound=Tolerant)


class Verb(Generic[A, R]):
    """A name with the types of its arguments and of its result."""

    def __init__(self, name: str, args: type[A], result: type[R]) -> None:
        self.name, self.args, self.result = name, args, result


PING = Verb("ping", Nothing, Pong)
HAVE = Verb("have", HaveArgs, HaveResult)
COMMIT_SEGMENT = Verb("commit_segment", CommitSegmentArgs, SegmentStatus)
COMMIT_DATASET = Verb("commit_dataset", CommitDatasetArgs, DatasetResult)
SUBMIT = Verb("submit", SubmitArgs, SubmitResult)
STATUS = Verb("status", JobArgs, JobsResult)
CANCEL = Verb("cancel", JobArgs, JobsResult)
LOGS = Verb("logs", ReadArgs, ReadResult)
METRICS = Verb("metrics", ReadArgs, ReadResult)
MODELS = Verb("models", Nothing, ModelsResult)
ARTIFACTS = Verb("artifacts", ArtifactsArgs, ArtifactsResult)
RUNTIME = Verb("runtime", RuntimeArgs, RuntimeResult)
GPU = Verb("gpu", Nothing, GpuResult)
