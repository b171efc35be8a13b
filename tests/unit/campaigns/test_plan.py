"""The plan steers to what is missing, asks nothing twice and ends."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.task import Outcome, Task
from campaigns.domains.base import SourceItem
from campaigns.plan import LEAST_CALLS, PATIENCE, Plan
from campaigns.spec import CampaignSpec
from campaigns.store import Call
from config.contracts.sample import Message
from config.errors import SourceMissing


class Letters:
    """A domain with a few cells; cell c has only three items."""

    name, template_version, system, benchmark_sets = "asm", 1, "s", ()

    def __init__(self, cells: str = "abc") -> None:
        self._cells = list(cells)

    def cells(self, sources: object) -> list[str]:
        return self._cells

    def item(self, cell: str, number: int, sources: object) -> SourceItem | None:
        return None if cell == "c" and number >= 3 else SourceItem(f"{cell}{number}", cell, "q", "f")

    def prompt(self, item: SourceItem) -> list[Message]:
        return [Message(role="user", content=item.id)]


def make(target: int, cells: str = "abc") -> Plan:
    lane = {"provider": "ollama", "model": "m", "host": "h"}
    spec = CampaignSpec.model_validate({"name": "x", "target": target, "domains": {"asm": 1}, "lanes": {"l": lane}})
    return Plan(spec, [Letters(cells)], {})  # type: ignore[list-item]


def end(plan: Plan, task: Task, accepted: bool) -> None:
    plan.ended(Outcome(task, "l", "p", 1, None), accepted)


def test_shares_sum_to_the_target() -> None:
    assert [cell.share for cell in make(10).cells.values()] == [4, 3, 3]


def test_the_cell_that_misses_most_is_next() -> None:
    plan = make(9)
    tasks = [plan.next() for _ in range(6)]
    assert Counter(task.cell for task in tasks if task) == {"a": 2, "b": 2, "c": 2}
    for task in tasks:
        assert task
        end(plan, task, task.cell != "b")
    following = [plan.next() for _ in range(3)]
    assert Counter(task.cell for task in following if task)["b"] == 2


def test_items_that_are_used_up_come_again_as_another_draw() -> None:
    plan = make(5, "c")
    tasks = [task for task in iter(plan.next, None)]
    assert [(task.source_id, task.draw, task.sampling.seed) for task in tasks] == [
        ("c0", 0, 0), ("c1", 0, 0), ("c2", 0, 0), ("c0", 1, 1), ("c1", 1, 1),
    ]  # fmt: skip
    assert len({task.id for task in tasks}) == 5


def test_a_hopeless_cell_hands_its_share_to_the_others() -> None:
    plan = make(9)
    while task := plan.next():
        end(plan, task, task.cell != "b")
    assert {name[1]: cell.accepted for name, cell in plan.cells.items()} == {"a": 5, "b": 0, "c": 4}
    assert len(plan.cells["asm", "b"].used) == LEAST_CALLS


def test_a_hopeless_campaign_ends() -> None:
    plan = make(9)
    calls = 0
    while task := plan.next():
        calls += 1
        end(plan, task, False)
    assert 3 * LEAST_CALLS <= calls <= 3 * LEAST_CALLS + PATIENCE * 9
    assert plan.accepted == 0


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32), st.integers(0, 60))
def test_a_restart_asks_again_what_was_cut_off_and_nothing_else(target: int, slots: int, seed: int, crash_after: int) -> None:
    chance = random.Random(seed)
    plan, flying, calls, asked = make(target), [], [], Counter[str]()
    for _ in range(crash_after):
        while len(flying) < slots and (task := plan.next()):
            flying.append(task)
            asked[task.id] += 1
        if not flying:
            break
        task = flying.pop(chance.randrange(len(flying)))
        cell, number, _ = plan.item(task)
        verdict = chance.choice(["accepted", "rejected"])
        end(plan, task, verdict == "accepted")
        calls.append(Call(task_id=task.id, domain="asm", cell=cell.name, number=number, verdict=verdict))
    again, lost = make(target), {task.id for task in flying}
    for call in calls:
        again.restore(call)
    done = {call.task_id for call in calls}
    while task := again.next():
        assert task.id not in done
        done.add(task.id)
        end(again, task, True)
    if not any(cell.closed for cell in again.cells.values()):
        assert again.accepted == target
        assert lost <= done


def test_sources_that_hold_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="no asm fact in 0 files"):
        lane = {"provider": "ollama", "model": "m", "host": "h"}
        spec = CampaignSpec.model_validate({"name": "x", "target": 1, "domains": {"asm": 1}, "lanes": {"l": lane}})
        Plan(spec, [Letters("")], {"asm": []})  # type: ignore[list-item]
