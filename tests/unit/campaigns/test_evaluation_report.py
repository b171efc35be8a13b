"""Reports say what the figures say and no more."""

import pytest

from campaigns.evaluation.report import COLUMNS, Evaluation, SetResult, conclusion, markdown, rows, terminal
from campaigns.evaluation.score import Answer
from config.contracts.job import Perplexity

TOTAL = 60


def answers(right: int, *, text: str = "It loads.", total: int = TOTAL) -> list[Answer]:
    return [Answer(f"item {n}", f"What does item {n} do?", text, n < right, "" if n < right else "flags") for n in range(total)]


def evaluation(base: int, examples: int, tuned: int, *, said: str = "Nothing.") -> Evaluation:
    contenders = {
        "base": answers(base, text=said),
        "base + 3 examples": answers(examples),
        "tuned": answers(tuned),
    }
    perplexity = Perplexity(rows=20, tokens=600, base=12.345, tuned=1.234)
    sets = [SetResult("unseen-operands", contenders), SetResult("unseen-pairs", contenders)]
    return Evaluation("smollm2-135m", "hafs-coder:v1", "asm", sets, perplexity)


def test_the_figures_are_counts_shares_and_gains() -> None:
    base, examples, tuned = rows(evaluation(0, 12, 48).sets[0])
    assert (base.right, examples.right, tuned.right, base.total) == (0, 12, 48, TOTAL)
    assert base.gain is not None and base.gain.estimate == pytest.approx(0.8)
    assert examples.gain is not None and examples.gain.estimate == pytest.approx(0.6)
    assert tuned.gain is None
    assert base.reasons == (("flags", 60),)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((0, 12, 48), "unseen-operands: tuned beats base and base + 3 examples."),
        ((0, 47, 48), "unseen-operands: tuned beats base; no improvement shown over base + 3 examples."),
        ((20, 20, 20), "unseen-operands: no improvement shown over base and base + 3 examples."),
        ((0, 48, 20), "unseen-operands: tuned beats base; tuned is worse than base + 3 examples."),
    ],
)
def test_the_conclusion_claims_no_more_than_the_intervals(counts: tuple[int, int, int], sentence: str) -> None:
    result = evaluation(*counts)
    assert conclusion(result.sets[0]) == sentence
    assert sentence in markdown(result)


def test_the_terminal_report_fits_and_holds_the_figures() -> None:
    text = terminal(evaluation(0, 12, 48, said="word " * 80))
    assert max(len(line) for line in text.splitlines()) <= COLUMNS
    for part in ("48/60", "80 % [68, 88]", "+80 [+67, +88]", "12.35 before, 1.23 after", "20 held-out rows", "hafs-coder:v1"):
        assert part in text, part


def test_markdown_has_a_table_a_set_and_names_its_methods() -> None:
    text = markdown(evaluation(0, 12, 48))
    assert text.count("| model | right |") == 2
    assert "| base + 3 examples | 12/60 |" in text
    assert "Wilson" in text and "Newcombe" in text


def test_an_answer_cannot_draw_on_the_terminal_or_mark_up_the_page() -> None:
    result = evaluation(0, 0, 60, said="\x1b[2J# title\n| a | b |\n<script>")
    assert "\x1b" not in terminal(result) + markdown(result)
    shown = [line for line in markdown(result).splitlines() if "title" in line]
    assert shown and all(line.startswith("    ") for line in shown)


def test_the_examples_are_the_first_question_of_each_set_whatever_came_of_it() -> None:
    text = terminal(evaluation(60, 60, 0))
    assert text.count("Q: What does item 0 do?") == 2
    assert "(wrong: flags)" in text


def test_contenders_must_have_answered_the_same_items() -> None:
    result = SetResult("unseen-pairs", {"base": answers(0, total=59), "tuned": answers(48)})
    with pytest.raises(ValueError, match="unseen-pairs"):
        rows(result)
