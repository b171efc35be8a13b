"""The plan steers to what is missing, asks nothing twice and ends."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.task import Outcome, Task
from campaigns.domains.base import SourceItem
from campaigns.plan import LEAST_CALLS, PATIENCE, Plan
from campaigns.spec import CampaignSpec
from campaigns.tally import Tally
from config.contracts.sample import Message
from config.errors import SourceMissing

ASM = ("asm",)


class Letters:
    """A domain with a few cells; cell c has only three items."""

    template_version, system, benchmark_sets = 1, "s", ()

    def __init__(self, cells: Iterable[str] = "abc", name: str = "asm") -> None:
        self._cells = list(cells)
        self.name = name

    def cells(self, sources: object) -> list[str]:
        return self._cells

    def item(self, cell: str, number: int, sources: object) -> SourceItem | None:
        return None if cell == "c" and number >= 3 else SourceItem(f"{cell}{number}", cell, "q", "f")

    def prompt(self, item: SourceItem) -> list[Message]:
        return [Message(role="user", content=item.id)]


def make(target: int, cells: Iterable[str] = "abc") -> Plan:
    lane = {"provider": "ollama", "model": "m", "host": "h"}
    spec = CampaignSpec.model_validate({"name": "x", "target": target, "domains": {"asm": 1}, "lanes": {"l": lane}})
    return Plan(spec, [Letters(cells)], {})  # type: ignore[list-item]


def tally(calls: list[dict[str, Any]]) -> Tally:
    made = Tally()
    for call in calls:
        made.count(call)
    return made


def end(plan: Plan, task: Task, accepted: bool) -> None:
    plan.ended(Outcome(task, "l", "p", 1, None), accepted)


def test_shares_sum_to_the_target() -> None:
    assert [cell.share for cell in make(10).cells.values()] == [4, 3, 3]


def test_the_cell_that_misses_most_is_next() -> None:
    plan = make(9)
    tasks = [plan.next(ASM) for _ in range(6)]
    assert Counter(task.cell for task in tasks if task) == {"a": 2, "b": 2, "c": 2}
    for task in tasks:
        assert task
        end(plan, task, task.cell != "b")
    following = [plan.next(ASM) for _ in range(3)]
    assert Counter(task.cell for task in following if task)["b"] == 2


def test_items_that_are_used_up_come_again_as_another_draw() -> None:
    plan = make(5, "c")
    tasks = [task for task in iter(lambda: plan.next(ASM), None)]
    assert [(task.source_id, task.draw, task.sampling.seed) for task in tasks] == [
        ("c0", 0, 0), ("c1", 0, 0), ("c2", 0, 0), ("c0", 1, 1), ("c1", 1, 1),
    ]  # fmt: skip
    assert len({task.id for task in tasks}) == 5


def test_a_hopeless_cell_hands_its_share_to_the_others() -> None:
    plan = make(9)
    while task := plan.next(ASM):
        end(plan, task, task.cell != "b")
    assert {name[1]: cell.accepted for name, cell in plan.cells.items()} == {"a": 5, "b": 0, "c": 4}
    assert len(plan.cells["asm", "b"].used) == LEAST_CALLS


def test_a_hopeless_campaign_ends() -> None:
    plan = make(9)
    calls = 0
    while task := plan.next(ASM):
        calls += 1
        end(plan, task, False)
    assert 3 * LEAST_CALLS <= calls <= 3 * LEAST_CALLS + PATIENCE * 9
    assert plan.accepted == 0


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32), st.integers(0, 60))
def test_a_restart_asks_again_what_was_cut_off_and_nothing_else(target: int, slots: int, seed: int, crash_after: int) -> None:
    chance = random.Random(seed)
    plan, flying, calls, asked = make(target), list[Task](), list[dict[str, Any]](), Counter[str]()
    for _ in range(crash_after):
        while len(flying) < slots and (task := plan.next(ASM)):
            flying.append(task)
            asked[task.id] += 1
        if not flying:
            break
        task = flying.pop(chance.randrange(len(flying)))
        cell, number, _ = plan.item(task)
        verdict = chance.choice(["accepted", "rejected"])
        end(plan, task, verdict == "accepted")
        calls.append({"task_id": task.id, "domain": "asm", "cell": cell.name, "number": number, "verdict": verdict})
    again, lost = make(target), {task.id for task in flying}
    again.restore(tally(calls).cells)
    assert again.accepted == plan.accepted
    done = {call["task_id"] for call in calls}
    while task := again.next(ASM):
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


def two_domains(target: int) -> Plan:
    lane = {"provider": "ollama", "model": "m", "host": "h"}
    shares = {"asm": 1, "rom_hack": {"share": 3, "private": True}}
    spec = CampaignSpec.model_validate({"name": "x", "target": target, "domains": shares, "lanes": {"l": lane}})
    return Plan(spec, [Letters("ab"), Letters("de", "rom_hack")], {})  # type: ignore[list-item]


def test_only_domains_that_are_asked_for_are_handed_out() -> None:
    plan = two_domains(8)
    assert plan.remaining() == 8
    assert [task.cell for task in iter(lambda: plan.next(["asm"]), None)] == ["a", "b"]
    assert plan.remaining() == 6
    assert plan.next([]) is None
    assert plan.next(["unknown"]) is None
    tasks = [task for task in iter(lambda: plan.next(["asm", "rom_hack"]), None)]
    assert Counter(task.cell for task in tasks) == {"d": 3, "e": 3}
    assert plan.remaining() == 0
    end(plan, tasks[0], False)
    assert plan.remaining() == 1


def test_a_domain_keeps_its_share_as_long_as_one_of_its_cells_can_do_it() -> None:
    plan = two_domains(8)
    while task := plan.next(["asm", "rom_hack"]):
        end(plan, task, task.cell != "a")
    assert {name[1]: cell.accepted for name, cell in plan.cells.items()} == {"a": 0, "b": 2, "d": 3, "e": 3}


VERDICTS = st.sampled_from(["accepted", "rejected", "failed"])


@given(st.lists(st.tuples(st.integers(0, 3), VERDICTS), max_size=80), st.integers(1, 6))
def test_the_next_task_is_always_of_a_cell_that_misses_most(ends: list[tuple[int, str]], slots: int) -> None:
    plan, flying = make(40, "abdefg"), list[Task]()
    for which, verdict in ends:
        while len(flying) < slots:
            missing = {cell.name: cell.missing for cell in plan.cells.values() if not cell.closed}
            task = plan.next(ASM)
            if task is None:
                break
            assert missing[task.cell] == max(missing.values())
            flying.append(task)
        if flying:
            end(plan, flying.pop(which % len(flying)), verdict == "accepted")


def test_neither_numbers_nor_the_queue_grow_with_the_tasks() -> None:
    plan, flying = make(1000, "abdef"), list[Task]()
    for turn in range(3000):
        while len(flying) < 8 and (task := plan.next(ASM)):
            flying.append(task)
        if not flying:
            break
        end(plan, flying.pop(turn % len(flying)), turn % 3 == 0)
    assert all(len(cell.used.above) < 8 for cell in plan.cells.values())
    assert len(plan._queues["asm"]._entries) <= 4 * 5 + 16


def test_the_end_of_a_cells_items_is_found_without_asking_for_each() -> None:
    asked: list[int] = []

    class Long(Letters):
        def item(self, cell: str, number: int, sources: object) -> SourceItem | None:
            asked.append(number)
            return None if number >= 3000 else super().item("a", number, sources)

    spec = make(9)._spec
    plan = Plan(spec, [Long("a")], {})  # type: ignore[list-item]
    item, draw = plan.source_item(plan.cells["asm", "a"], 7001)
    assert (item.id, draw) == ("a1001", 2)
    assert plan.cells["asm", "a"].items == 3000
    assert len(asked) < 20
