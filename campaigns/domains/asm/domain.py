"""The asm domain: short explanations of 65816 assembly. All methods are pure but for reading the source files they are given."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from campaigns.domains.asm import prompts
from campaigns.domains.asm.catalogue import catalogue
from campaigns.domains.asm.changes import changes
from campaigns.domains.asm.items import UNSEEN_OPERANDS, UNSEEN_PAIRS, benchmark_items, corpus_item
from campaigns.domains.asm.sources import source_cells, source_item
from campaigns.domains.asm.verify import verify
from campaigns.domains.base import Change, SourceItem, Verdict
from config.contracts.sample import Message


class AsmDomain:
    """See campaigns.domains.base.Domain."""

    name = "asm"
    template_version = 1
    system = prompts.SYSTEM
    benchmark_sets: tuple[str, ...] = (UNSEEN_OPERANDS, UNSEEN_PAIRS)

    def cells(self, sources: Sequence[Path]) -> list[str]:
        return source_cells(sources) if sources else list(catalogue().cells)

    def item(self, cell: str, number: int, sources: Sequence[Path]) -> SourceItem | None:
        return source_item(cell, number, sources) if sources else corpus_item(cell, number)

    def prompt(self, item: SourceItem) -> list[Message]:
        return prompts.teacher_prompt(item)

    def question(self, item: SourceItem) -> list[Message]:
        return prompts.student_question(item)

    def worked_examples(self, item: SourceItem, count: int) -> list[Message]:
        return prompts.question_examples(item, count)

    def verify(self, item: SourceItem, text: str) -> Verdict:
        return verify(item, text)

    def benchmark(self, name: str, count: int) -> list[SourceItem]:
        return benchmark_items(name, count)

    def changes(self, item: SourceItem, text: str) -> Iterable[Change]:
        return changes(item, text)
