"""Rows of the JSONL files: what a campaign makes and a node trains on."""

from typing import Literal

from pydantic import JsonValue

from config.contracts.base import Tolerant

Role = Literal["system", "user", "assistant"]


class Message(Tolerant):
    role: Role
    content: str


class Provenance(Tolerant):
    """Where a row comes from. Cost is in USD; times are Unix seconds."""

    campaign: str
    task_id: str
    cell: str = ""  # what the plan balances, and the number of the source item within it
    number: int = 0
    provider: str = ""
    model: str = ""
    lane: str = ""
    attempt: int = 1
    prompt_sha256: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    created_at: float = 0.0


class Sample(Tolerant):
    """One accepted sample: the messages a user of the tuned model would send, and the answer to learn.

    `id` is the id of the task that made it. `source_id` names the source fact: held-out splits are made by it, so that
    two wordings of one fact never stand on both sides. `proof` is what the domain's verifier established.
    """

    id: str
    domain: str
    source_id: str
    messages: list[Message]
    completion: str
    proof: dict[str, JsonValue] = {}
    provenance: Provenance


class PreferencePair(Tolerant):
    """Two answers to one prompt. `change` names what makes the rejected one worse."""

    id: str
    domain: str
    source_id: str
    messages: list[Message]
    chosen: str
    rejected: str
    change: str
    provenance: Provenance
