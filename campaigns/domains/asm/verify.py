"""The check of an answer. What the grammar cannot read is rejected, so nothing can be added to a fact.

The reasons of a rejection name the first fact that is wrong; `wording` is left for texts whose parts are right and whose whole is
not read. They explain and never decide.
"""

import re
from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from campaigns.domains.asm.catalogue import Form
from campaigns.domains.asm.grammar import FLAG_NAMES, mark, pattern_of, slot_patterns
from campaigns.domains.asm.items import form_of, operands_of
from campaigns.domains.base import SourceItem, Verdict

MAX_CHARS = 320
REASONS = ("length", "format", "operand", "flags", "register", "effect", "place", "wording")

_ONE_FLAG = r"(?:negative|overflow|zero|carry|(?-i:[NVZC]))(?: \(\w+\))?"
_FLAG_LIST = rf"{_ONE_FLAG}(?:,? (?:and )?{_ONE_FLAG})*"
_FLAGS = re.compile(rf"\b({_FLAG_LIST}) (?:status )?flags?\b|\bflags ({_FLAG_LIST})", re.IGNORECASE)
_NO_FLAGS = re.compile(r"\b(?:no|any|not \w+ the) flags?\b|without \w+ing (?:the )?flags", re.IGNORECASE)
_FOREIGN = re.compile(r"[^A-Za-z0-9 $#%,.()+;'-]")
_NUMBERS = re.compile(r"[$%][0-9A-Za-z]+|\b[0-9][0-9A-Za-z]*\b")
_REGISTERS = re.compile(r"(?P<A>accumulator|\bA register|register A\b)|\b(?:(?P<X>X)|(?P<Y>Y))\b|(?P<S>stack pointer)")


def verify(item: SourceItem, text: str) -> Verdict:
    """Accept a text that states the fact of the item and nothing beyond it; else reject with one of REASONS."""
    form, operands = form_of(item), operands_of(item)
    text = re.sub(" +", " ", text.strip())
    reason = _unreadable(text) or _mismatch(form, operands, text)
    if reason:
        return Verdict(False, reason)
    facts: dict[str, JsonValue] = {"operands": list(operands), "registers": list(sorted(_registers_of(form)))}
    return Verdict(True, proof={"form": form.name, **facts, "flags": form.flags})


def _unreadable(text: str) -> str:
    if not text or len(text) > MAX_CHARS:
        return "length"
    return "format" if _FOREIGN.search(text) else ""


def _mismatch(form: Form, operands: Sequence[str], text: str) -> str:
    """The reason against a readable text, empty where the grammar of the form matches all of it."""
    marks = {operand: mark(place) for place, operand in enumerate(dict.fromkeys(operands))}
    marked = _NUMBERS.sub(lambda number: marks.get(number[0].upper(), number[0]), text)
    ordered = tuple(marks[operand] for operand in operands)
    if pattern_of(form, ordered).fullmatch(marked):
        return ""
    if {number.upper() for number in _NUMBERS.findall(text)} != set(operands):
        return "operand"
    return next(_problems(form, ordered, marked))


def _problems(form: Form, marks: tuple[str, ...], text: str) -> Iterator[str]:
    if form.flags is not None and _flags_named(text) != form.flags:
        yield "flags"
    beyond_code = text.replace(form.code(list(marks)), "")
    if {str(match.lastgroup) for match in _REGISTERS.finditer(beyond_code)} != _registers_of(form):
        yield "register"
    verbs = "|".join(wording.split(" ")[0] for wording in form.wordings)
    if not re.search(rf"\b(?:{verbs})\b", text, re.IGNORECASE):
        yield "effect"
    if _misplaced(form, marks, text):
        yield "place"
    yield "wording"


def _flags_named(text: str) -> str | None:
    """The flags said to change, in the order NVZC; "" where it is said that none does, None where nothing is said."""
    if _NO_FLAGS.search(text):
        return ""
    found = [listed or after for listed, after in _FLAGS.findall(text)]
    if not found:
        return None
    named = found[-1]  # a clause before it may clear or set the carry
    return "".join(flag for flag, name in FLAG_NAMES.items() if re.search(rf"\b(?:{flag}|(?i:{name}))\b", named))


def _registers_of(form: Form) -> set[str]:
    indexes = (step.mode.name.partition(",")[2] for step in form.steps)
    named = {str(match.lastgroup) for match in _REGISTERS.finditer(" ".join([form.wordings[0], *indexes]))}
    return (named | {form.register, form.target}) - {""}


def _misplaced(form: Form, marks: tuple[str, ...], text: str) -> bool:
    """Whether an address is missing or spoken of as another kind of address, or an immediate as an address."""
    places = [pattern for name, pattern in slot_patterns(form, marks).items() if name.startswith("place")]
    kinds = {step.mode.kind for step in form.steps}
    said = text.lower()
    if any(kind in said for kind in {"direct page", "absolute", "long"} - kinds) or (not places and "address" in said):
        return True
    return not all(re.search(place, text, re.IGNORECASE) for place in places)
