import pytest

from agents import tokens
from agents.budget import Budget
from agents.prices import Price
from agents.task import Sampling, Usage
from config.contracts.sample import Message
from config.errors import BudgetExceeded

PROMPT = [Message(role="user", content="0123456789")]
PRICE = Price(1e-3, 1e-2)
SAMPLING = Sampling(max_tokens=10)
WORST = tokens.at_most(PROMPT) * 1e-3 + 10 * 1e-2


def test_a_reservation_holds_the_worst_case_until_it_is_settled() -> None:
    budget = Budget(1.0)
    held = budget.reserve(PRICE, PROMPT, SAMPLING)
    assert held.usd == budget.reserved_usd == pytest.approx(WORST)
    assert (budget.spent_usd, budget.outstanding) == (0.0, 1)
    cost = budget.settle(held, Usage(prompt_tokens=5, completion_tokens=2, thinking_tokens=1))
    assert cost.usd == budget.spent_usd == pytest.approx(5e-3 + 3e-2)
    assert not cost.assumed
    assert (budget.reserved_usd, budget.outstanding) == (0, 0)


@pytest.mark.parametrize("usage", [None, Usage()])
def test_without_usage_the_worst_case_is_assumed(usage: Usage | None) -> None:
    budget = Budget(1.0)
    cost = budget.settle(budget.reserve(PRICE, PROMPT, SAMPLING), usage)
    assert cost.assumed and cost.usd == budget.spent_usd == pytest.approx(WORST)


def test_spent_and_reserved_together_never_pass_the_maximum() -> None:
    budget = Budget(2.5 * WORST + 1, spent_usd=1.0)
    first = budget.reserve(PRICE, PROMPT, SAMPLING)
    budget.reserve(PRICE, PROMPT, SAMPLING)
    with pytest.raises(BudgetExceeded, match=r"the budget of \$1\.\d+ is met: \$1.0000 spent") as raised:
        budget.reserve(PRICE, PROMPT, SAMPLING)
    assert "max_usd" in raised.value.hint
    assert budget.outstanding == 2  # a refusal holds nothing
    budget.release(first)
    assert budget.spent_usd == 1.0
    budget.reserve(PRICE, PROMPT, SAMPLING)


def test_without_a_maximum_all_is_counted_and_nothing_refused() -> None:
    budget = Budget(None)
    held = [budget.reserve(PRICE, PROMPT, SAMPLING) for _ in range(100)]
    for reservation in held:
        budget.settle(reservation, None)
    assert budget.spent_usd == pytest.approx(100 * WORST)


def test_an_unknown_price_is_never_said_to_be_nothing() -> None:
    budget = Budget(None)
    assert budget.settle(budget.reserve(None, PROMPT, SAMPLING), Usage(5, 5)).assumed


def test_what_is_reserved_counts_the_schema_and_the_thinking() -> None:
    schema = '{"type": "object"}'
    plain = Budget(None).reserve(PRICE, PROMPT, SAMPLING).usd
    with_schema = Budget(None).reserve(PRICE, PROMPT, Sampling(max_tokens=10, schema=schema)).usd
    thinking = Budget(None).reserve(PRICE, PROMPT, SAMPLING, thinking_tokens=100).usd
    assert with_schema - plain >= len(schema) * PRICE.input_usd
    assert thinking - plain == pytest.approx(100 * PRICE.output_usd)


def test_nothing_held_is_nothing_reserved_whatever_was_rounded() -> None:
    budget = Budget(1.0)
    held = [budget.reserve(Price(10.0**-n, 0.0), PROMPT, SAMPLING) for n in range(4, 12)]
    for reservation in held:
        budget.release(reservation)
    assert budget.reserved_usd == 0.0


def test_a_reservation_is_settled_once() -> None:
    budget = Budget(1.0)
    held = budget.reserve(PRICE, PROMPT, SAMPLING)
    budget.settle(held, None)
    with pytest.raises(KeyError):
        budget.settle(held, None)
