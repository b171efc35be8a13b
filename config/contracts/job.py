"""A training job as a person writes it, as the node keeps it, and the states it goes through."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from config.contracts.base import Strict, Tolerant, content_id
from config.contracts.base_name import checked_base
from config.contracts.manifest import NAME
from config.contracts.names import Portable

Quantization = Literal[
    "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K"
]  # of the weights of a GGUF, as llama.cpp names it
MODEL_NAME = r"^[a-z0-9_][a-z0-9_.-]{0,79}$"  # a part of an Ollama model name; lower case, as Ollama compares names


class LoraOptions(Strict):
    rank: int = Field(16, ge=1, le=512)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class TrainOptions(Strict):
    epochs: float = Field(2, gt=0)
    lr: float = Field(1e-3, gt=0)
    batch: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1)
    max_length: int = Field(512, ge=16)
    warmup_steps: int = Field(3, ge=0)
    held_out: float = Field(0.1, gt=0, lt=0.9, description="share of the source facts kept out of training")
    save_steps: int = Field(20, ge=1)
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class DpoOptions(Strict):
    beta: float = Field(0.1, gt=0)


class ExportOptions(Strict):
    """What is registered at the model server, and what has to happen before the aliases move to it.

    `route` adapter: the base and a small adapter beside it; merged: one GGUF of both, weights in `quantize` (F16 where that is
    empty); auto: adapter where the base is a GGUF, else merged, in Q8_0 where `quantize` is empty. `promote` gate: the aliases
    move when the smoke gate is passed; eval: by `hafs run`, where its benchmarks speak for it, or by `hafs models promote`.
    `size` stands in the tag (hafs-coder:14b-v7); empty: counted from the base's parameters.
    """

    route: Literal["auto", "adapter", "merged"] = "auto"
    quantize: Quantization | Literal[""] = ""
    promote: Literal["gate", "eval"] = "gate"
    size: str = Field("", pattern=r"^([0-9]{1,4}(\.[0-9])?[mbt])?$")

    @model_validator(mode="after")
    def _quantize_belongs_to_merged(self) -> "ExportOptions":
        if self.quantize and self.route == "adapter":
            raise ValueError('quantize needs route = "merged": the adapter route keeps the base as it is')
        return self


class JobSpec(Strict):
    """The TOML file of a job. `data` names campaigns or sets of pairs on the laptop.

    `base` is a GGUF file on the node, `package:NAME`, the one GGUF file inside an installed Python package, or
    `hf:OWNER/REPO[@REVISION]/FILE.gguf`, which the node fetches from the Hugging Face hub. `start`, for dpo, is a model of the
    node (`hafs-coder` or `hafs-coder:v2`) whose adapter the training goes on from.
    """

    kind: Literal["sft", "dpo"]
    name: Annotated[str, Field(pattern=MODEL_NAME), Portable]
    base: Annotated[str, AfterValidator(checked_base)]
    data: list[Annotated[str, Field(pattern=NAME), Portable]] = Field(min_length=1)
    start: str = ""
    system: str = ""
    probe: str = Field("Hello.", description="the question the smoke gate asks")
    lora: LoraOptions = LoraOptions()
    train: TrainOptions = TrainOptions()
    dpo: DpoOptions = DpoOptions()
    export: ExportOptions = ExportOptions()

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Peers that do not know `export` yet take every other job, and the keys of earlier jobs stay what they are."""
        written: dict[str, Any] = write(self)
        if self.export == ExportOptions():
            del written["export"]
        return written

    @model_validator(mode="after")
    def _start_belongs_to_dpo(self) -> "JobSpec":
        if self.kind == "dpo" and not self.start:
            raise ValueError('a dpo job needs start = "NAME", the SFT model it goes on from')
        if self.kind == "sft" and self.start:
            raise ValueError("start belongs to a dpo job; an sft job begins from base")
        return self


class TrainJob(Tolerant):
    """What crosses the wire: the spec, the dataset it trains on, and the key that makes a submit idempotent.

    Of the jobs that wait, one of a higher `priority` goes first. `after` is the id of a job of the same node that has to
    succeed before. Neither is part of the key: they say when, not what.
    """

    spec: JobSpec
    dataset_id: str
    code_version: str
    nonce: str
    priority: int = Field(0, ge=-100, le=100)
    after: str = ""

    @property
    def key(self) -> str:
        return content_id([self.spec.model_dump(mode="json"), self.dataset_id, self.code_version, self.nonce])


class JobState(StrEnum):
    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    RUNNING = "RUNNING"
    EVALUATING = "EVALUATING"
    EXPORTING = "EXPORTING"
    REGISTERING = "REGISTERING"
    INTERRUPTED = "INTERRUPTED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        return self in ENDED

    @property
    def active(self) -> bool:
        """A runner works on it."""
        return self in STAGES

    def may_become(self, new: "JobState") -> bool:
        """The legal transitions: stages go forward, any stage may end or be interrupted, what ended stays ended."""
        if self is JobState.QUEUED:
            return new in (JobState.PREPARING, JobState.CANCELLED, JobState.FAILED)
        if self is JobState.INTERRUPTED:
            return new in (JobState.QUEUED, JobState.CANCELLED, JobState.FAILED)
        if self.ended:
            return False
        if new in STAGES:
            return STAGES.index(new) > STAGES.index(self)
        return new is not JobState.QUEUED and (new is not JobState.SUCCEEDED or self is JobState.REGISTERING)


STAGES = (JobState.PREPARING, JobState.RUNNING, JobState.EVALUATING, JobState.EXPORTING, JobState.REGISTERING)
ENDED = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class Metrics(Tolerant):
    """One line of metrics.jsonl. Memory is the peak of the process in MB; `time` is Unix seconds."""

    time: float
    step: int
    steps: int
    epoch: float
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    memory_mb: float | None = None
    eta_s: float | None = None
    extra: dict[str, float] = {}  # dpo: reward accuracy, margins


class Perplexity(Tolerant):
    """exp of the mean negative log-likelihood a completion token, on the held-out rows."""

    rows: int
    tokens: int
    base: float
    tuned: float


class PairScores(Tolerant):
    """Held-out preference pairs. Source of the first: Rafailov et al. 2023, DPO, implicit reward beta*log(pi/pi_ref).

    `reward_accuracy`: share of pairs whose chosen answer gains more over the reference than the rejected one.
    `chosen_likelier`: share of pairs whose chosen answer the tuned model itself finds likelier; `_reference` before training.
    """

    pairs: int
    reward_accuracy: float
    reward_margin: float
    chosen_likelier: float
    chosen_likelier_reference: float


class JobResult(Tolerant):
    """What a finished job leaves: the tag it registered and its figures. `alias` is <name>:latest where it was moved, else empty;
    `aliases` are all that were.
    """

    model: str  # hafs-coder:14b-v7; hafs-coder:v7 for one without a size
    alias: str = ""
    aliases: list[str] = []
    note: str = ""
    folder: str = ""  # below the node's root
    runtime: str = ""  # URL of the server it is registered at, as the node sees it
    perplexity: Perplexity | None = None
    pairs: PairScores | None = None
    train_s: float = 0.0
    steps: int = 0


class JobError(Tolerant):
    code: str
    message: str
    hint: str = ""


class JobView(Tolerant):
    """A job as the node reports it."""

    id: str
    kind: str
    name: str
    state: JobState
    detail: str = ""
    attempt: int = 0
    created_at: float
    updated_at: float
    dataset_id: str = ""
    priority: int = 0
    after: str = ""
    error: JobError | None = None
    result: JobResult | None = None
