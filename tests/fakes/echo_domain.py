"""A domain without end: it asks what a bare loop asks and accepts every answer. It shows what the engine itself costs.

python -m tests.fakes.echo_domain campaign start SPEC …       (hafs that knows it too)
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from campaigns.cli.main import main
from campaigns.domains import registry
from campaigns.domains.base import Change, SourceItem, Verdict
from config.contracts.sample import Message


class EchoDomain:
    """See campaigns.domains.base.Domain."""

    name = "echo"
    template_version = 1
    system = "You repeat."
    benchmark_sets: tuple[str, ...] = ()

    def cells(self, sources: Sequence[Path]) -> list[str]:
        return [f"cell-{number}" for number in range(16)]

    def item(self, cell: str, number: int, sources: Sequence[Path]) -> SourceItem | None:
        return SourceItem(f"{cell}/{number}", cell, f"p{number}", f"{cell} {number}")

    def prompt(self, item: SourceItem) -> list[Message]:
        return [Message(role="user", content=f"{item.question} {item.cell}")]

    def question(self, item: SourceItem) -> list[Message]:
        return self.prompt(item)

    def worked_examples(self, item: SourceItem, count: int) -> list[Message]:
        return []

    def verify(self, item: SourceItem, text: str) -> Verdict:
        return Verdict(bool(text), "" if text else "empty")

    def benchmark(self, name: str, count: int) -> list[SourceItem]:
        return []

    def changes(self, item: SourceItem, text: str) -> Iterable[Change]:
        return []


def register() -> None:
    registry._DOMAINS[EchoDomain.name] = EchoDomain


if __name__ == "__main__":
    register()
    main()
