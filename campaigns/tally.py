"""What a campaign's calls amount to, counted one by one and kept in memory that does not grow with them (but for answers: see
campaigns.seen). Counting the same calls in the same order gives the same tally, in one go or from a saved tally onwards.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from campaigns.seen import Seen

MOST_REASONS = 100  # a reason is a short stable word; should one be free text after all, it shall not fill the memory
OTHER = "other"


@dataclass
class Numbers:
    """A set of numbers from 0 that has few holes: all below `below`, and those in `above`."""

    below: int = 0
    above: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return self.below + len(self.above)

    def __contains__(self, number: int) -> bool:
        return number < self.below or number in self.above

    def add(self, number: int) -> None:
        if number > self.below:
            self.above.add(number)
        elif number == self.below:
            self.below += 1
            while self.below in self.above:
                self.above.remove(self.below)
                self.below += 1


@dataclass
class CellTally:
    """`used` are the numbers whose call has ended, whatever its verdict."""

    accepted: int = 0
    used: Numbers = field(default_factory=Numbers)


@dataclass
class LaneTally:
    """Calls of one lane: `ok` were answered (accepted or rejected). Cost in USD; latency in seconds, the sum of all calls."""

    ok: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: float = 0.0
    latency_s: float = 0.0

    def count(self, call: Mapping[str, Any]) -> None:
        if call["verdict"] == "failed":
            self.failed += 1
        else:
            self.ok += 1
        get = call.get
        self.prompt_tokens += get("prompt_tokens", 0)
        self.completion_tokens += get("completion_tokens", 0)
        self.thinking_tokens += get("thinking_tokens", 0)
        self.cached_tokens += get("cached_tokens", 0)
        self.cost_usd += get("cost_usd", 0.0)
        self.latency_s += get("latency_s", 0.0)


@dataclass
class Counts:
    """Counts of calls by domain, by reason and by lane. Cost is in USD; `assumed_usd` is the part that nobody reported."""

    accepted: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lanes: dict[str, LaneTally] = field(default_factory=dict)
    cost_usd: float = 0.0
    assumed_usd: float = 0.0

    def count(self, call: Mapping[str, Any]) -> None:
        """Count a line of calls.jsonl. Raises KeyError, TypeError for a row that is none."""
        verdict = call["verdict"]
        if verdict == "accepted":
            self.accepted[call["domain"]] += 1
        else:
            (self.rejected if verdict == "rejected" else self.failed)[call["domain"]] += 1
            reason = call.get("reason", "")
            self.reasons[reason if reason in self.reasons or len(self.reasons) < MOST_REASONS else OTHER] += 1
        if lane := call.get("lane"):
            if lane not in self.lanes:
                self.lanes[lane] = LaneTally()
            self.lanes[lane].count(call)
        if cost := call.get("cost_usd"):
            self.cost_usd += cost
            self.assumed_usd += cost * call.get("cost_assumed", False)

    def copy(self) -> "Counts":
        return copy.deepcopy(self)


@dataclass
class Tally:
    """All that a restart needs to know of the calls that were made; `cells` by (domain, cell), `calls` are lines."""

    counts: Counts = field(default_factory=Counts)
    cells: dict[tuple[str, str], CellTally] = field(default_factory=dict)
    answers: Seen = field(default_factory=Seen)
    calls: int = 0

    def count(self, call: Mapping[str, Any]) -> None:
        """Count a line of calls.jsonl. Raises KeyError, TypeError, ValueError for a row that is none."""
        self.counts.count(call)
        key = call["domain"], call["cell"]
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = CellTally()
        cell.used.add(call["number"])
        if call["verdict"] == "accepted":
            cell.accepted += 1
        if answer := call.get("answer"):
            self.answers.add(int(answer, 16))
        self.calls += 1

    def dump(self) -> dict[str, Any]:
        """As JSON, without the answers."""
        cells = [[*key, cell.accepted, cell.used.below, sorted(cell.used.above)] for key, cell in self.cells.items()]
        counts = {**vars(self.counts), "lanes": {name: vars(lane) for name, lane in self.counts.lanes.items()}}
        return {"calls": self.calls, "counts": counts, "cells": cells}

    @classmethod
    def load(cls, dumped: dict[str, Any], answers: Seen) -> "Tally":
        """The tally that was dumped. Raises KeyError, TypeError, ValueError where it is none."""
        counts = dict(dumped["counts"])
        lanes = {name: LaneTally(**lane) for name, lane in counts.pop("lanes").items()}
        for name in ("accepted", "rejected", "failed", "reasons"):
            counts[name] = Counter(counts[name])
        cells = {
            (domain, cell): CellTally(accepted, Numbers(below, set(above)))
            for domain, cell, accepted, below, above in dumped["cells"]
        }
        return cls(Counts(lanes=lanes, **counts), cells, answers, dumped["calls"])
