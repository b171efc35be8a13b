"""The table of answers holds what was put in, in little memory."""

import random

from hypothesis import given
from hypothesis import strategies as st

from campaigns.seen import Seen, answer_id


@given(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1)))
def test_it_is_a_set(values: list[int]) -> None:
    seen = Seen()
    for value in values:
        seen.add(value)
    known = {value or 1 for value in values}  # zero marks a free slot, so it counts as one
    assert len(seen) == len(known)
    assert all(value in seen for value in values)
    assert not any(value in seen for value in range(2, 60) if value not in known)


def test_it_grows_and_stays_small() -> None:
    chance, seen = random.Random(1), Seen()
    values = [chance.getrandbits(64) for _ in range(20_000)]
    for value in values:
        seen.add(value)
    assert all(value in seen for value in values)
    assert len(seen) == 20_000
    assert 8 * len(seen.slots) <= 24 * len(seen)
    copied = Seen(seen.slots[:], len(seen))
    assert values[7] in copied


def test_an_answer_is_named_by_question_and_text() -> None:
    assert answer_id("s", "text") == answer_id("s", "text") != answer_id("t", "text")
    assert 0 < int(answer_id("s", "text"), 16) < 2**64
