"""Counting from the start or from a saved tally onwards is the same."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from campaigns.seen import Seen
from campaigns.tally import MOST_REASONS, OTHER, Numbers, Tally


@given(st.permutations(range(30)))
def test_numbers_are_a_set_without_the_memory_of_one(order: list[int]) -> None:
    numbers, known = Numbers(), set[int]()
    for number in order:
        numbers.add(number)
        numbers.add(number)
        known.add(number)
        assert len(numbers) == len(known)
        assert all((each in numbers) is (each in known) for each in range(31))
        assert numbers.below == min(set(range(32)) - known)
    assert not numbers.above


def call(number: int, verdict: str = "accepted", **more: object) -> dict[str, Any]:
    return {"task_id": str(number), "domain": "asm", "cell": "a", "number": number, "verdict": verdict, **more}


CALLS = [
    call(0, lane="gpu", cost_usd=0.1, answer="a", prompt_tokens=7, completion_tokens=3, latency_s=0.5),
    call(1, "rejected", reason="flags", lane="gpu", cost_usd=0.2, cost_assumed=True, thinking_tokens=5, cached_tokens=2),
    call(3, "failed", reason="unavailable", lane="flash"),
    {**call(2), "cell": "b", "domain": "rom_hack"},
    call(4, "failed"),
]


def count(tally: Tally, calls: list[dict[str, Any]]) -> Tally:
    for each in calls:
        tally.count(each)
    return tally


def test_what_is_counted() -> None:
    tally = count(Tally(), CALLS)
    counts = tally.counts
    assert (counts.accepted, counts.rejected, counts.failed) == ({"asm": 1, "rom_hack": 1}, {"asm": 1}, {"asm": 2})
    assert counts.reasons == {"flags": 1, "unavailable": 1, "": 1}
    assert (round(counts.cost_usd, 9), counts.assumed_usd) == (0.3, 0.2)
    gpu = counts.lanes["gpu"]
    assert (gpu.ok, gpu.failed, gpu.prompt_tokens, gpu.completion_tokens) == (2, 0, 7, 3)
    assert (gpu.thinking_tokens, gpu.cached_tokens, gpu.latency_s) == (5, 2, 0.5)
    assert (counts.lanes["flash"].ok, counts.lanes["flash"].failed) == (0, 1)
    assert tally.cells["asm", "a"].accepted == 1
    assert tally.cells["asm", "a"].used == Numbers(2, {3, 4})
    assert 10 in tally.answers


def test_a_saved_tally_goes_on_as_if_it_had_never_stopped() -> None:
    whole = count(Tally(), CALLS)
    for split in range(len(CALLS) + 1):
        first = count(Tally(), CALLS[:split])
        loaded = Tally.load(json.loads(json.dumps(first.dump())), first.answers)
        again = count(loaded, CALLS[split:])
        assert again.dump() == whole.dump()
        assert (again.counts, again.cells) == (whole.counts, whole.cells)


def test_free_text_as_a_reason_does_not_fill_the_memory() -> None:
    tally = count(Tally(), [call(number, "failed", reason=f"error {number}") for number in range(3 * MOST_REASONS)])
    assert len(tally.counts.reasons) == MOST_REASONS + 1
    assert tally.counts.reasons[OTHER] == 2 * MOST_REASONS


def test_an_empty_tally_can_be_saved() -> None:
    assert Tally.load(json.loads(json.dumps(Tally().dump())), Seen()).dump() == Tally().dump()
