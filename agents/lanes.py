"""Lanes and endpoints: what a scheduler is told about the ways to a model, and what it tells about them.

A lane is one model at one server. Limits belong to the endpoint, the real bottleneck: an Ollama or vLLM server by its URL, a
Gemini model by its project. Lanes that share an endpoint share its limits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.gpu import Telemetry
from agents.prices import Price
from agents.providers.base import Provider
from config.errors import ConfigError

MOST_IN_FLIGHT = 128  # at an endpoint that nobody told a number of slots

# Why a slot is idle although there is work: limit (as many calls as the server is found to bear), rate (requests or tokens a
# minute or day), breaker (it does not answer), threshold (others use the GPU), lease (a training job has it), measuring (a moment
# of silence to see who uses the GPU), swap (another model's turn), tail (a faster lane ends sooner), budget (waits for a
# settlement), free_first (paid lanes are not needed for the deadline), closed (for good), storing (answers wait
# for the disk), stopping; no_work: there is none.
Idle = Literal[
    "",
    "limit",
    "rate",
    "breaker",
    "threshold",
    "lease",
    "measuring",
    "swap",
    "tail",
    "budget",
    "free_first",
    "closed",
    "storing",
    "stopping",
    "no_work",
]


@dataclass(frozen=True)
class GpuThresholds:
    """Load of others, in %: under `low` the lane takes all its slots, over `high` none."""

    low: float
    high: float
    telemetry: Telemetry


@dataclass(frozen=True)
class Endpoint:
    """What limits belong to.

    Args:
        key: names the bottleneck; lanes with equal keys share it.
        queues: what is too much waits there (Ollama, vLLM), instead of being answered with 429.
        swaps: it may hold one model at a time.
        slots: calls at once; None: found by measuring.
        rpm, tpm, rpd: calls and tokens in any 60 s, calls a day.
        shared: a folder where processes that use the same endpoint find each other; None: nobody else does.
    """

    key: str
    queues: bool = True
    swaps: bool = False
    slots: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    rpd: int | None = None
    gpu: GpuThresholds | None = None
    shared: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if any(limit is not None and limit < 1 for limit in (self.slots, self.rpm, self.tpm, self.rpd)):
            raise ConfigError(f"{self.key}: slots, rpm, tpm and rpd start at 1", hint="leave the lane out to use none of it")


@dataclass(frozen=True)
class Lane:
    """One model at one endpoint. `own`: on the user's own machine, so free; `price` None: not known, or free if it is own."""

    name: str
    provider: Provider
    model: str
    endpoint: Endpoint
    timeout_s: float = 120.0
    price: Price | None = None
    own: bool = True
    typical_s: float | None = None  # how long an answer takes, where that is known before the first one
    keeps: bool = False  # a call that is left is not lost: the next one for the same prompt gets its answer (batches)
    thinking_tokens: int = 0  # most of them that may be billed on top of max_tokens

    @property
    def paid(self) -> bool:
        return self.price is not None or not self.own


@dataclass(frozen=True)
class LaneEvent:
    """Something a person who reads the log wants to know of a lane."""

    lane: str
    kind: Literal["closed", "down", "back", "limit", "swap", "idle"]
    text: str


@dataclass(frozen=True)
class LaneView:
    """A lane at one moment. `idle_s`: seconds in which it had a free slot, by reason; `latency_s`: a recent average."""

    name: str
    model: str
    endpoint: str
    paid: bool
    in_flight: int
    limit: int
    ok: int
    failed: int
    idle: Idle
    idle_s: Mapping[str, float]
    latency_s: float | None
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    last_error: str
