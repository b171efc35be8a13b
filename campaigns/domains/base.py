"""What a domain is: where facts come from, how to ask about them, how a machine checks the answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from config.contracts.sample import Message


@dataclass(frozen=True)
class SourceItem:
    """One fact. `id` names the fact; held-out splits and deduplication are made by it. `cell` is what the plan balances."""

    id: str
    cell: str
    question: str
    fact: str
    details: dict[str, JsonValue] = field(default_factory=dict, hash=False)  # what the verifier checks against


@dataclass(frozen=True)
class Verdict:
    """`reason` is a short stable word for reports (flags, operand, register, length …); `proof` goes into the sample."""

    accepted: bool
    reason: str = ""
    proof: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A controlled change that makes a right answer wrong: `name` says which fact it breaks."""

    name: str
    text: str


class Domain(Protocol):
    """All methods are pure and deterministic: the same arguments give the same result in every process."""

    name: str
    template_version: int
    system: str  # the system message of every training row, and of the registered model
    benchmark_sets: tuple[str, ...]

    def cells(self, sources: Sequence[Path]) -> list[str]:
        """What the campaign's target is spread over, in order. `sources` empty: the corpus that ships with the domain."""
        ...

    def item(self, cell: str, number: int, sources: Sequence[Path]) -> SourceItem | None:
        """The number-th (from 0) source item of a cell, never one of a benchmark; None where the cell has no more."""
        ...

    def prompt(self, item: SourceItem) -> list[Message]:
        """What the teacher is sent: system message, worked examples, the fact, the instruction."""
        ...

    def question(self, item: SourceItem) -> list[Message]:
        """What the student is trained on and asked: system message and the question without the fact."""
        ...

    def worked_examples(self, item: SourceItem, count: int) -> list[Message]:
        """Question and answer pairs (user, assistant, …) of other cells, for a base model that was not tuned."""
        ...

    def verify(self, item: SourceItem, text: str) -> Verdict:
        """Accept only what states the fact and nothing beyond it."""
        ...

    def benchmark(self, name: str, count: int) -> list[SourceItem]:
        """The first `count` items of a held-out set; none of them is ever an item of a cell."""
        ...

    def changes(self, item: SourceItem, text: str) -> Iterable[Change]:
        """Wrong variants of an accepted answer, one fact broken in each; every one fails `verify`."""
        ...
