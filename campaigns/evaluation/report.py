"""The report of an evaluation, as plain text of at most 100 columns and as Markdown. Pure functions.

Tuned "beats" another only where the whole 95 % interval of the paired difference is above zero; all else is no improvement shown.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from campaigns.evaluation.score import Answer
from campaigns.evaluation.statistics import Interval, paired_difference, wilson
from config.contracts.job import Perplexity

COLUMNS = 100
BASE, TUNED = "base", "tuned"
SIDE_BY_SIDE = 2  # answers shown of base and tuned
TOP_REASONS = 3


@dataclass(frozen=True)
class SetResult:
    """The answers of every contender ("base", "base + 3 examples", "tuned") to the same items of one benchmark set."""

    name: str
    answers: dict[str, Sequence[Answer]]


@dataclass(frozen=True)
class Evaluation:
    base: str
    tuned: str  # the models' names
    domain: str
    sets: Sequence[SetResult]
    perplexity: Perplexity | None = None


@dataclass(frozen=True)
class Row:
    """One contender on one set; `gain` is what tuned has over it (None for tuned itself)."""

    contender: str
    right: int
    total: int
    share: Interval
    gain: Interval | None
    reasons: tuple[tuple[str, int], ...]


def rows(result: SetResult) -> list[Row]:
    """The figures of a set.

    Raises:
        ValueError: contenders answered different items, or none.
    """
    tuned = result.answers[TUNED]
    table = []
    for contender, answers in result.answers.items():
        if [answer.item_id for answer in answers] != [answer.item_id for answer in tuned]:
            raise ValueError(f"{result.name}: {contender} and {TUNED} answered different items")
        correct = [answer.correct for answer in answers]
        gain = None if contender == TUNED else paired_difference([answer.correct for answer in tuned], correct)
        reasons = Counter(answer.reason for answer in answers if not answer.correct).most_common(TOP_REASONS)
        table.append(Row(contender, sum(correct), len(correct), wilson(sum(correct), len(correct)), gain, tuple(reasons)))
    return table


def conclusion(result: SetResult) -> str:
    """One sentence that claims no more than the intervals do."""
    gains = {row.contender: row.gain for row in rows(result) if row.gain}
    worse = [name for name, gain in gains.items() if gain.high < 0]
    beaten = [name for name, gain in gains.items() if gain.low > 0]
    open_ = [name for name in gains if name not in worse and name not in beaten]
    parts = [f"tuned beats {_and(beaten)}"] if beaten else []
    parts += [f"no improvement shown over {_and(open_)}"] if open_ else []
    parts += [f"tuned is worse than {_and(worse)}"] if worse else []
    return f"{result.name}: {'; '.join(parts)}."


def terminal(evaluation: Evaluation) -> str:
    """Plain text, at most COLUMNS wide."""
    lines = textwrap.wrap(_title(evaluation), COLUMNS)
    for result in evaluation.sets:
        lines += ["", f"{result.name} ({len(result.answers[TUNED])} questions)"]
        lines.append(f"  {'':24}{'right':>9}  {'share [95 %]':20}  tuned gains [95 %], points")
        for row in rows(result):
            gain = _points(row.gain) if row.gain else ""
            lines.append(f"  {row.contender[:23]:24}{f'{row.right}/{row.total}':>9}  {_share(row.share):20}  {gain}".rstrip())
        lines += [f"  wrong answers of {row.contender}: {_reasons(row)}" for row in rows(result) if row.reasons]
        lines += textwrap.wrap(conclusion(result), COLUMNS, initial_indent="  ", subsequent_indent="  ")
    if evaluation.perplexity:
        lines += ["", *textwrap.wrap(_perplexity(evaluation.perplexity), COLUMNS)]
    for question, before, after in side_by_side(evaluation):
        lines += ["", *_wrapped("Q: ", question), *_wrapped("  base:  ", _shown(before)), *_wrapped("  tuned: ", _shown(after))]
    return "\n".join(lines) + "\n"


def markdown(evaluation: Evaluation) -> str:
    """The same as Markdown. Answers are untrusted text: they are shown as indented code, where no markup counts."""
    lines = [f"# {_title(evaluation)}", ""]
    for result in evaluation.sets:
        lines += [f"## {result.name}", "", "| model | right | share [95 %] | tuned gains [95 %], points | wrong for |"]
        lines.append("| --- | --- | --- | --- | --- |")
        for row in rows(result):
            gain = _points(row.gain) if row.gain else ""
            lines.append(f"| {row.contender} | {row.right}/{row.total} | {_share(row.share)} | {gain} | {_reasons(row)} |")
        lines += ["", conclusion(result), ""]
    if evaluation.perplexity:
        lines += [_perplexity(evaluation.perplexity), ""]
    for question, before, after in side_by_side(evaluation):
        lines += [f"    Q: {_line(question)}", f"    base:  {_shown(before)}", f"    tuned: {_shown(after)}", ""]
    lines.append("Shares: Wilson score intervals. Gains: paired differences, Newcombe 1998, method 10.")
    return "\n".join(lines) + "\n"


def side_by_side(evaluation: Evaluation) -> list[tuple[str, Answer, Answer]]:
    """The first question of each set with the answers of base and tuned: taken by place, not by how they turned out."""
    shown: list[tuple[str, Answer, Answer]] = []
    for result in evaluation.sets:
        if BASE in result.answers and len(shown) < SIDE_BY_SIDE:
            before, after = result.answers[BASE][0], result.answers[TUNED][0]
            shown.append((before.question, before, after))
    return shown


def _title(evaluation: Evaluation) -> str:
    return f"{evaluation.domain}: {evaluation.tuned} against its base {evaluation.base}"


def _share(share: Interval) -> str:
    return f"{100 * share.estimate:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _points(gain: Interval) -> str:
    return f"{100 * gain.estimate:+.0f} [{100 * gain.low:+.0f}, {100 * gain.high:+.0f}]"


def _reasons(row: Row) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in row.reasons)


def _perplexity(perplexity: Perplexity) -> str:
    figures = f"{perplexity.base:.2f} before, {perplexity.tuned:.2f} after"
    return f"Perplexity of the answers, on {perplexity.rows} held-out rows: {figures}."


def _shown(answer: Answer) -> str:
    return f"{_line(answer.text)} ({'right' if answer.correct else f'wrong: {answer.reason}'})"


def _line(text: str) -> str:
    """One printable line: a model's answer may hold line ends and control characters (a terminal would obey those)."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(_line(text), COLUMNS, initial_indent=label, subsequent_indent=" " * len(label))


def _and(names: list[str]) -> str:
    return " and ".join(names)
