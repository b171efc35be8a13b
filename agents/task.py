"""What an agent works on: a task asks a model for one completion; an outcome says how that ended."""

from dataclasses import dataclass, field
from typing import Any, Literal

from config.contracts.base import content_id
from config.contracts.sample import Message

_ADDED: dict[str, Any] = {"top_k": None, "stop": ()}  # to Sampling, after ids had been made of it


@dataclass(frozen=True)
class Sampling:
    """Options sent to the model. `num_ctx` is the context window in tokens that an Ollama server is asked for.

    `schema` is the JSON text of a JSON Schema that the answer has to follow; empty: free text. `top_k` (None: the server's own)
    and `stop` (texts that end the answer; none: the model's own) are for people who talk to a model: Ollama's servers take them.
    """

    temperature: float = 0.4
    top_p: float = 1.0
    max_tokens: int = 96
    num_ctx: int = 2048
    seed: int | None = None
    schema: str = ""
    top_k: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def named(self) -> dict[str, Any]:
        """What ids are made of. Fields that were added later count only where they are set: older ids stay as they are."""
        return {name: value for name, value in vars(self).items() if name not in _ADDED or value != _ADDED[name]}


@dataclass(frozen=True)
class Task:
    """One prompt to be answered. The id names its content: not the lane or the model, which are provenance."""

    domain: str
    cell: str  # what the plan balances: an instruction in an addressing mode
    source_id: str
    messages: tuple[Message, ...]  # the system message first
    sampling: Sampling
    template_version: int
    draw: int  # 0, 1, … for the same prompt
    id: str = field(init=False, default="")

    def __post_init__(self) -> None:
        messages = [message.model_dump() for message in self.messages]
        key = [self.domain, self.source_id, messages, self.sampling.named, self.template_version, self.draw]
        object.__setattr__(self, "id", content_id(key))


@dataclass(frozen=True)
class Usage:
    """Tokens. `cached_tokens` are those of `prompt_tokens` that the server had read before; `completion_tokens` are without
    `thinking_tokens`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    cached_tokens: int = 0


FinishReason = Literal["stop", "length", "blocked", "other"]


@dataclass(frozen=True)
class Completion:
    """A whole answer of a model. `finish_reason` other than stop is never a sample; `detail` is the server's word for it
    (SAFETY, "the prompt was cut"), where there is one.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    model: str
    latency_s: float
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """The one end of a task: a completion, or the error that no retry could mend."""

    task: Task
    lane: str
    provider: str
    attempt: int
    completion: Completion | None
    error: str = ""
    reason: str = ""  # one stable word for the error
    cost_usd: float = 0.0
    cost_assumed: bool = False  # a paid call that ended without usage is settled at its reservation
