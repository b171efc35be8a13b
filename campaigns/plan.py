"""What to ask next. The plan is a stream: the next task belongs to the cell that misses most, counting what is in flight.

A task's number within its cell is used once and is the same after a restart, so a call that a crash cut off is asked again under
the same id and nothing is asked twice. A cell that spends its calls without meeting its share hands the rest to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agents.task import Outcome, Task
from campaigns.domains.base import Domain, SourceItem
from campaigns.spec import CampaignSpec
from campaigns.store import Call
from config.errors import SourceMissing

PATIENCE = 6  # calls a cell may spend for each sample of its share …
LEAST_CALLS = 20  # … but never fewer than these


@dataclass
class Cell:
    domain: Domain
    name: str
    share: int  # accepted samples wanted
    accepted: int = 0
    used: set[int] = field(default_factory=set)  # numbers that have ended
    in_flight: set[int] = field(default_factory=set)
    items: int | None = None  # how many source items there are, once known
    closed: bool = False  # it spent its calls: its unmet share went to the others
    lowest: int = 0  # no number below it is free

    @property
    def missing(self) -> int:
        return self.share - self.accepted - len(self.in_flight)

    @property
    def spent(self) -> bool:
        return self.accepted < self.share and len(self.used) >= max(LEAST_CALLS, PATIENCE * self.share)

    def take_number(self) -> int:
        """The lowest number that is neither used nor in flight; a crash may have left holes."""
        while self.lowest in self.used or self.lowest in self.in_flight:
            self.lowest += 1
        self.in_flight.add(self.lowest)
        return self.lowest


class Plan:
    """A TaskSource for the scheduler: `next` hands out tasks, `ended` takes their outcomes."""

    def __init__(self, spec: CampaignSpec, domains: Sequence[Domain], sources: dict[str, list[Path]]) -> None:
        self._spec, self._sources = spec, sources
        self.cells: dict[tuple[str, str], Cell] = {}
        weight = sum(spec.domains.values())
        shares = _round_to(spec.target, [spec.domains[domain.name] / weight for domain in domains])
        for domain, share in zip(domains, shares, strict=True):
            names = domain.cells(sources.get(domain.name, []))
            if not names:
                raise SourceMissing(
                    f"sources.{domain.name}: no {domain.name} fact in {len(sources[domain.name])} files",
                    hint="check that the pattern names the right files, or leave the line out to use the shipped corpus",
                )
            for name, part in zip(names, _round_to(share, [1 / len(names)] * len(names)), strict=True):
                self.cells[domain.name, name] = Cell(domain, name, part)
        self._items: dict[str, tuple[Cell, int, SourceItem]] = {}

    @property
    def accepted(self) -> int:
        return sum(cell.accepted for cell in self.cells.values())

    def restore(self, call: Call) -> None:
        """Count a call of an earlier run. Cells that the sources no longer have are left alone."""
        if cell := self.cells.get((call.domain, call.cell)):
            cell.used.add(call.number)
            cell.accepted += call.verdict == "accepted"

    def next(self) -> Task | None:
        """The next task, or None while all that is missing is in flight."""
        if self.accepted + len(self._items) >= self._spec.target:
            return None
        self._close_spent_cells()
        open_cells = [cell for cell in self.cells.values() if not cell.closed]
        cell = max(open_cells, key=lambda cell: cell.missing, default=None)  # the first of equals: cells are in corpus order
        return self._task(cell) if cell and cell.missing > 0 else None

    def item(self, task: Task) -> tuple[Cell, int, SourceItem]:
        """What a task in flight was made of."""
        return self._items[task.id]

    def ended(self, outcome: Outcome, accepted: bool) -> None:
        cell, number, _ = self._items.pop(outcome.task.id)
        cell.in_flight.discard(number)
        cell.used.add(number)
        cell.accepted += accepted

    def _close_spent_cells(self) -> None:
        """Hand what spent cells still miss to the open ones, the smallest share first."""
        for spent in [cell for cell in self.cells.values() if not cell.closed and cell.spent]:
            rest, spent.share, spent.closed = spent.share - spent.accepted, spent.accepted, True
            heirs = [cell for cell in self.cells.values() if not cell.closed]
            for _ in range(rest if heirs else 0):
                min(heirs, key=lambda cell: cell.share).share += 1

    def _task(self, cell: Cell) -> Task:
        number = cell.take_number()
        item, draw = self.source_item(cell, number)
        task = Task(
            domain=cell.domain.name,
            cell=cell.name,
            source_id=item.id,
            messages=tuple(cell.domain.prompt(item)),
            sampling=self._spec.sampling.sampling(draw),
            template_version=cell.domain.template_version,
            draw=draw,
        )
        self._items[task.id] = (cell, number, item)
        return task

    def source_item(self, cell: Cell, number: int) -> tuple[SourceItem, int]:
        """The number-th item of a cell and its draw: when the items are used up they come again as the next draw."""
        sources = self._sources.get(cell.domain.name, [])
        if cell.items is None:
            if (item := cell.domain.item(cell.name, number, sources)) is not None:
                return item, 0
            cell.items = next(n for n in range(number + 1) if cell.domain.item(cell.name, n, sources) is None)
        item = cell.domain.item(cell.name, number % cell.items, sources)
        assert item is not None, f"{cell.name} has {cell.items} items"
        return item, number // cell.items


def _round_to(total: int, parts: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of `parts` (which sum to 1) that sum to `total`: largest remainder method."""
    floors = [int(total * part) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: floors[i] - total * parts[i])
    for index in order[: total - sum(floors)]:
        floors[index] += 1
    return floors
