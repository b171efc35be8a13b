"""The wire between laptop and node: one line of ASCII JSON a request, one a reply, over stdin and stdout of `hafs-node rpc`.

Arguments and results are the models below; a verb is described by a `Verb`, so both sides agree by construction.
"""

import base64
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, ValidationError

from config.contracts.base import Tolerant
from config.contracts.gpu import GpuReading
from config.contracts.job import JobError, JobState, JobView, PairScores, Perplexity, Quantization, TrainJob
from config.contracts.manifest import SHA256, DatasetManifest, Segment
from config.contracts.names import Portable
from config.errors import ConfigError

PROTOCOL_VERSION = 1
MAX_LINE_BYTES = 8 * 2**20
MODEL_TAG = r"^([A-Za-z0-9_][A-Za-z0-9_.-]*([/:][A-Za-z0-9_][A-Za-z0-9_.-]*)*)?$"  # as a model server names models; or empty
MAX_BODY_BYTES = 2**30
ARRIVED_EVERY_S = 2.0  # while a body arrives, the node gives a sign of life so often


class Request(Tolerant):
    """`body_bytes` raw bytes follow the line. They are read off whatever the answer is, so the next line is found."""

    version: int = PROTOCOL_VERSION
    verb: str
    args: dict[str, Any] = {}
    body_bytes: int = Field(0, ge=0, le=MAX_BODY_BYTES)


class Reply(Tolerant):
    """Either `result` or `error`; `error.code` is the name of a class in config.errors.

    A line with `arrived` is no reply yet: so many bytes of the request's body have come.
    """

    version: int = PROTOCOL_VERSION
    result: dict[str, Any] | None = None
    error: JobError | None = None
    arrived: int | None = None


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
    """`present`: verified, and in the store before a dataset is made of it. Else `offset` packed bytes have come so far."""

    sha256: str
    present: bool
    offset: int = 0


class HaveResult(Tolerant):
    segments: list[SegmentStatus]


class ReceiveArgs(Tolerant):
    """The packed bytes of `segment` from `offset` on are the body of the request."""

    segment: Segment
    offset: int = Field(0, ge=0)


class CommitDatasetArgs(Tolerant):
    manifest: DatasetManifest


class DatasetResult(Tolerant):
    id: str
    rows: int
    new: bool


class DatasetView(Tolerant):
    """A dataset that the node has whole. `at`: when it was committed, Unix seconds."""

    id: str
    name: str
    campaigns: list[str]
    rows: int
    at: float


class DatasetsResult(Tolerant):
    """The newest first."""

    datasets: list[DatasetView]


class GcArgs(Tolerant):
    dry_run: bool = False


class Garbage(Tolerant):
    """A file below the root that nobody needs."""

    name: str
    bytes: int


class GcResult(Tolerant):
    """What went, or would go."""

    garbage: list[Garbage]


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


class EventsArgs(Tolerant):
    """The changes of all jobs after number `after`; wait up to `wait_s` for one."""

    after: int = Field(0, ge=0)
    wait_s: float = Field(0, ge=0, le=30)


class JobEvent(Tolerant):
    """A job became `state`, or its `detail` changed, at `at` (Unix seconds). `seq` only grows."""

    seq: int
    job: str
    at: float
    state: JobState
    detail: str = ""


class EventsResult(Tolerant):
    """`next` is `after` of the next question."""

    events: list[JobEvent]
    next: int


class ReadArgs(Tolerant):
    """Read a growing file from `offset`; wait up to `wait_s` for something new."""

    job: str
    attempt: int = 0  # 0: the newest
    offset: int = Field(0, ge=0)
    wait_s: float = Field(0, ge=0, le=30)


class ReadResult(Tolerant):
    """`text` ends at a whole line unless the attempt has ended. `offset` is where the next read begins.

    `raw`: the same in base64 where the file's bytes are no UTF-8; empty: they are those of `text`.
    """

    text: str
    offset: int
    attempt: int
    job: JobView
    raw: str = ""

    @property
    def data(self) -> bytes:
        """The bytes of the file."""
        return base64.b64decode(self.raw) if self.raw else self.text.encode()


class ModelVersion(Tolerant):
    """One registered version. `alias` is <name>:latest where it carries that, `aliases` are all that it carries.

    `promoted`: it stands in the line that a rollback goes back through. `fault`: why the gate stopped it. `note`: what is not as
    it should be at the model server.
    """

    tag: str
    alias: str = ""
    aliases: list[str] = []
    promoted: bool = False
    route: str = "adapter"
    quantized: str = ""
    fault: str = ""
    note: str = ""
    kind: str
    job: str
    base: str
    dataset_id: str
    created_at: float
    perplexity_base: float | None = None
    perplexity_tuned: float | None = None


class ModelsResult(Tolerant):
    """`models` passed the gate, `failed` did not and are kept for inspection. `checked`: a model server answered, and the
    aliases are those that it has now; else they are those that were set last.
    """

    models: list[ModelVersion]
    failed: list[ModelVersion] = []
    checked: bool = False


ModelTag = Annotated[str, Field(pattern=MODEL_TAG, min_length=1, max_length=200)]


class ModelArgs(Tolerant):
    """`model` is a tag (hafs-coder:14b-v7, or shorter hafs-coder:v7), an alias or a name."""

    model: ModelTag

    @classmethod
    def typed(cls, model: str) -> Self:
        """Of what a person has typed. Raises ConfigError."""
        try:
            return cls(model=model)
        except ValidationError:
            raise ConfigError(
                f"{model[:100]!r} names no model", hint="give a tag, an alias or a name: hafs models list"
            ) from None


class RollbackArgs(ModelArgs):
    """`leave` is the version that is to be left: asked twice, the second time changes nothing."""

    leave: str = Field("", max_length=200)


class PruneArgs(Tolerant):
    """Keep the `keep` newest of each name (of all names where `name` is empty) that passed the gate, and as many that did not;
    and what carries an alias, is loaded or is needed by a job.
    """

    keep: int = Field(ge=1)
    name: str = Field("", max_length=200)
    dry_run: bool = False


class ModelsChanged(Tolerant):
    """The versions concerned as they are now. `removed`: tags of what went, or would go. `notes`: what could not be done."""

    models: list[ModelVersion] = []
    removed: list[str] = []
    notes: list[str] = []


class Ancestor(Tolerant):
    """A version with all that the node knows of how it came to be. `spec` is the job's; `code` the version of hafs.

    `manifest` None: the node no longer has the dataset. `segments`: paths of its packed rows there, by SHA-256, of those it has.
    """

    version: ModelVersion
    name: str
    base_sha256: str
    adapter_sha256: str
    digest: str = ""
    start: str = ""
    quantizer: str = ""
    perplexity: Perplexity | None = None
    pairs: PairScores | None = None
    statistics: dict[str, Any] = {}
    spec: dict[str, Any] = {}
    code: str = ""
    deleted: bool = False
    manifest: DatasetManifest | None = None
    segments: dict[str, str] = {}


class LineageResult(Tolerant):
    """The version that was asked for, then the one that it went on from, and so on."""

    chain: list[Ancestor]


class ExportArgs(Tolerant):
    """Make another form of a version, or (`start` False) ask how far that is; wait up to `wait_s` for its end."""

    model: ModelTag
    route: Literal["merged", "adapter", "hf"]
    quantize: Quantization | Literal[""] = ""
    start: bool = True
    wait_s: float = Field(0, ge=0, le=30)


class ExportState(Tolerant):
    """`done` of `total` bytes are written in the present `step`. `files` are named below the version's folder."""

    tag: str
    state: Literal["running", "done", "failed"]
    step: str = ""
    done: int = 0
    total: int = 0
    files: list[str] = []
    quantized: str = ""
    quantizer: str = ""
    note: str = ""
    error: JobError | None = None


class ArtifactsArgs(Tolerant):
    model: str  # hafs-coder, hafs-coder:14b-v7 or hafs-coder:v7


class Artifact(Tolerant):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$"), Portable]
    path: str
    bytes: int
    sha256: str = Field(pattern=SHA256)


class ArtifactsResult(Tolerant):
    """`job` made the version; an older node does not say it."""

    tag: str
    job: str = ""
    files: list[Artifact]


class RuntimeArgs(Tolerant):
    """Ask for a model server on the node. `gguf` (named as a job's base is) is registered there if it is absent: as `model`, or,
    where that is empty, as hafs-base:<the first 12 digits of the file's SHA-256>, the name under which jobs use it too. Without
    `gguf` it is the server that has the node's models: an Ollama that is away is not replaced.
    """

    model: Annotated[str, Field(pattern=MODEL_TAG, max_length=200), Portable] = ""
    gguf: str = ""

    @classmethod
    def typed(cls, model: str, gguf: str) -> Self:
        """Of what a person has written. Raises ConfigError."""
        try:
            return cls(model=model, gguf=gguf)
        except ValidationError as error:
            raise ConfigError(
                f"a model server can have no model {model[:100]!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}",
                hint="a name looks like hafs-coder or llama3.2:1b: letters, digits, . _ and -, parts joined by / or :",
            ) from None


class RuntimeResult(Tolerant):
    """`model` is the name that `gguf` has there."""

    url: str
    model: str = ""
    embedded: bool
    version: str
    started: bool


class ServerResult(Tolerant):
    """The model server that answers on the node now; an empty `url`: none does. `loaded`: the models it holds in memory."""

    url: str = ""
    embedded: bool = False
    version: str = ""
    loaded: list[str] = []


class DoctorArgs(Tolerant):
    """`time`: what the asking machine's clock says, in Unix seconds; 0: it does not say."""

    time: float = 0.0


class DoctorCheck(Tolerant):
    """`hint` says what to do; a check that is ok may still carry one."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


class DoctorResult(Tolerant):
    """In the order in which what is wrong would stop a job."""

    checks: list[DoctorCheck]


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
RECEIVE = Verb("receive", ReceiveArgs, SegmentStatus)
COMMIT_DATASET = Verb("commit_dataset", CommitDatasetArgs, DatasetResult)
GC = Verb("gc", GcArgs, GcResult)
SUBMIT = Verb("submit", SubmitArgs, SubmitResult)
STATUS = Verb("status", JobArgs, JobsResult)
CANCEL = Verb("cancel", JobArgs, JobsResult)
RETRY = Verb("retry", JobArgs, JobsResult)
EVENTS = Verb("events", EventsArgs, EventsResult)
LOGS = Verb("logs", ReadArgs, ReadResult)
METRICS = Verb("metrics", ReadArgs, ReadResult)
MODELS = Verb("models", Nothing, ModelsResult)
LINEAGE = Verb("lineage", ModelArgs, LineageResult)
PROMOTE = Verb("promote", ModelArgs, ModelsChanged)
ROLLBACK = Verb("rollback", RollbackArgs, ModelsChanged)
DELETE = Verb("delete", ModelArgs, ModelsChanged)
PRUNE = Verb("prune", PruneArgs, ModelsChanged)
EXPORT = Verb("export", ExportArgs, ExportState)
ARTIFACTS = Verb("artifacts", ArtifactsArgs, ArtifactsResult)
RUNTIME = Verb("runtime", RuntimeArgs, RuntimeResult)
GPU = Verb("gpu", Nothing, GpuResult)
DOCTOR = Verb("doctor", DoctorArgs, DoctorResult)
DATASETS = Verb("datasets", Nothing, DatasetsResult)
SERVER = Verb("server", Nothing, ServerResult)
