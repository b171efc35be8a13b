"""What to ask next. The plan is a stream: the next task belongs to the cell that misses most, counting what is in flight.

A task's number within its cell is used once and is the same after a restart, so a call that a crash cut off is asked again under
the same id and nothing is asked twice. A cell that spends its calls without meeting its share hands the rest to the others.
Memory grows with the cells and with what is in flight, not with the tasks; the next task is found in O(log cells).
"""

import heapq
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agents.task import Outcome, Task
from campaigns.domains.base import Domain, SourceItem
from campaigns.spec import CampaignSpec
from campaigns.tally import CellTally, Numbers
from config.errors import SourceMissing

PATIENCE = 6  # calls a cell may spend for each sample of its share …
LEAST_CALLS = 20  # … but never fewer than these


@dataclass(eq=False)
class Cell:
    domain: Domain
    name: str
    place: int  # in the order of the corpus
    share: int  # accepted samples wanted
    accepted: int = 0
    used: Numbers = field(default_factory=Numbers)  # numbers that have ended
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


class _Queue:
    """The cells of a domain, the one that misses most first; of equals the first in corpus order.

    An entry is (-missing, place, cell). One that its cell has outgrown is left where it is until it comes to the top.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = cells
        self._entries: list[tuple[int, int, Cell]] = []
        self.rebuild()

    def rebuild(self) -> None:
        self._entries = [(-cell.missing, cell.place, cell) for cell in self._cells if not cell.closed]
        heapq.heapify(self._entries)

    def changed(self, cell: Cell) -> None:
        heapq.heappush(self._entries, (-cell.missing, cell.place, cell))
        if len(self._entries) > 4 * len(self._cells) + 16:
            self.rebuild()

    def top(self) -> tuple[int, int, Cell] | None:
        while self._entries:
            missing, _, cell = self._entries[0]
            if not cell.closed and -missing == cell.missing:
                return self._entries[0]
            heapq.heappop(self._entries)
        return None


class Plan:
    """A TaskSource for the scheduler: `next` hands out tasks, `ended` takes their outcomes."""

    def __init__(self, spec: CampaignSpec, domains: Sequence[Domain], sources: dict[str, list[Path]]) -> None:
        self._spec, self._sources = spec, sources
        self.cells: dict[tuple[str, str], Cell] = {}
        self.accepted = 0
        weight = sum(spec.domains[domain.name].share for domain in domains)
        shares = _round_to(spec.target, [spec.domains[domain.name].share / weight for domain in domains])
        for domain, share in zip(domains, shares, strict=True):
            names = domain.cells(sources.get(domain.name, []))
            if not names:
                raise SourceMissing(
                    f"sources.{domain.name}: no {domain.name} fact in {len(sources[domain.name])} files",
                    hint="check that the pattern names the right files, or leave the line out to use the shipped corpus",
                )
            for name, part in zip(names, _round_to(share, [1 / len(names)] * len(names)), strict=True):
                self.cells[domain.name, name] = Cell(domain, name, len(self.cells), part)
        self._queues = {
            domain.name: _Queue([cell for (name, _), cell in self.cells.items() if name == domain.name]) for domain in domains
        }
        self._items: dict[str, tuple[Cell, int, SourceItem]] = {}
        self._to_look_at: set[Cell] = set()  # cells that may have spent their calls
        self._open = len(self.cells)

    def restore(self, cells: Mapping[tuple[str, str], CellTally]) -> None:
        """Take over what earlier runs have done, before the first task. Cells that the sources no longer have are left alone."""
        for name, done in cells.items():
            if cell := self.cells.get(name):
                cell.used = Numbers(done.used.below, set(done.used.above))
                cell.lowest = done.used.below
                cell.accepted = done.accepted
                self.accepted += done.accepted
                self._to_look_at.add(cell)
        for queue in self._queues.values():
            queue.rebuild()

    def next(self, domains: Collection[str]) -> Task | None:
        """The next task of one of these domains, or None while all that is missing there is in flight."""
        self._close_spent_cells()
        if not self.remaining():
            return None
        tops = [top for domain in domains if domain in self._queues and (top := self._queues[domain].top())]
        cell = min(tops)[2] if tops else None
        return self._task(cell) if cell and cell.missing > 0 else None

    def remaining(self) -> int:
        """Tasks that are still to be handed out, if every answer is accepted."""
        return max(0, self._spec.target - self.accepted - len(self._items)) if self._open else 0

    def item(self, task: Task) -> tuple[Cell, int, SourceItem]:
        """What a task in flight was made of."""
        return self._items[task.id]

    def ended(self, outcome: Outcome, accepted: bool) -> None:
        cell, number, _ = self._items.pop(outcome.task.id)
        cell.in_flight.discard(number)
        cell.used.add(number)
        cell.accepted += accepted
        self.accepted += accepted
        self._to_look_at.add(cell)
        if not accepted:
            self._queues[cell.domain.name].changed(cell)

    def _close_spent_cells(self) -> None:
        """Hand what spent cells still miss to the open ones, the smallest share first."""
        while self._to_look_at:
            looked_at = sorted(self._to_look_at, key=lambda cell: cell.place)
            self._to_look_at.clear()
            for cell in looked_at:
                if not cell.closed and cell.spent:
                    self._close(cell)

    def _close(self, spent: Cell) -> None:
        rest, spent.share, spent.closed = spent.share - spent.accepted, spent.accepted, True
        self._open -= 1
        left = [cell for cell in self.cells.values() if not cell.closed]
        family = [cell for cell in left if cell.domain is spent.domain]  # a domain keeps its share as long as it can
        heirs = [(cell.share, cell.place, cell) for cell in family or left]
        heapq.heapify(heirs)
        for _ in range(rest if heirs else 0):
            heir = heirs[0][2]
            heir.share += 1
            self._to_look_at.add(heir)
            heapq.heapreplace(heirs, (heir.share, heir.place, heir))
        for queue in self._queues.values():
            queue.rebuild()

    def _task(self, cell: Cell) -> Task:
        number = cell.take_number()
        self._queues[cell.domain.name].changed(cell)
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
            # its items are the numbers below the first that has none
            cell.items = bisect_left(range(number), True, key=lambda n: cell.domain.item(cell.name, n, sources) is None)
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
