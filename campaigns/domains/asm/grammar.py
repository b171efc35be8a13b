"""The closed grammar of right answers: for a form, one pattern that matches the wordings of its fact and nothing else.

An answer is [subject] clause, then the statement of the flags. Operands stand in the pattern as marks (@0, @1), so that a form is
compiled once for all its items. No quantifier holds another: matching is linear in the text.
"""

import re
from collections.abc import Sequence
from functools import cache

from campaigns.domains.asm.catalogue import Form, Step

REGISTERS = {
    "": "",
    "A": r"(?:the )?(?:accumulator(?: register)?|(?-i:A) register|register (?-i:A)|accumulator \((?-i:A)\)|(?-i:A))",
    "X": r"(?:the )?(?:X(?: index)? register|index register X|register X|X)",
    "Y": r"(?:the )?(?:Y(?: index)? register|index register Y|register Y|Y)",
    "S": r"(?:the )?(?:stack pointer(?: register)?|S register)",
}
FLAG_NAMES = {"N": "negative", "V": "overflow", "Z": "zero", "C": "carry"}
_CHANGES = r"(?:updates|sets|affects|changes|modifies)"
_CHANGED = r"(?:updated|set|affected|changed|modified)"
_CHANGING = r"(?:updating|setting|affecting|changing|modifying)"
_BY_RESULT = r"(?: (?:accordingly|(?:from|by|(?:according|based) (?:to|on)|depending on) the result))?"


def mark(place: int) -> str:
    """What stands for an operand in a pattern and in the text that is held against it."""
    return f"@{place}"


@cache
def pattern_of(form: Form, marks: tuple[str, ...]) -> re.Pattern[str]:
    """The pattern of the whole answer; `marks` are those of the operands, in order (the same mark twice for equal operands)."""
    subject = _subject(form, marks)
    slots = slot_patterns(form, marks)
    fact, *also = form.wordings
    clauses = "|".join(_filled(wording, slots) for wording in (_literal(fact), *also))
    return re.compile(rf"(?:{subject} )?(?:{clauses}){_flag_statement(form.flags, subject)}\.?", re.IGNORECASE)


def slot_patterns(form: Form, marks: Sequence[str]) -> dict[str, str]:
    """The patterns of a wording's slots; an immediate has a value and no place."""
    slots = {"register": REGISTERS[form.register], "target": REGISTERS[form.target]}
    left = iter(marks)
    for number, step in enumerate(form.steps, 1):
        if step.mode.digits:
            suffixes = [str(number), ""] if len(form.steps) == 1 else [str(number)]
            for name, pattern in _operand(step, next(left)).items():
                slots |= {f"{name}{suffix}": pattern for suffix in suffixes}
    return slots


def _subject(form: Form, marks: Sequence[str]) -> str:
    code = rf"(?-i:{re.escape(form.code(list(marks)))})"
    ways = [rf"(?:the )?(?:instruction )?{code}(?: instruction)?", r"(?:this|the) (?:instruction|routine|code)", "it"]
    if len(form.steps) == 1:
        ways.append(rf"(?:the )?(?-i:{form.steps[0].mnemonic})(?: instruction)?")
    return f"(?:{'|'.join(ways)})"


def _literal(fact: str) -> str:
    """The plain text of a fact as a pattern that keeps its slots."""
    return re.sub(r"[^{}\w]", lambda character: re.escape(character[0]), fact)


def _filled(wording: str, slots: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: slots[slot[1]], wording)


def _operand(step: Step, marked: str) -> dict[str, str]:
    if not step.mode.place:
        return {"value": rf"(?:the )?(?:immediate |constant )?(?:(?:value|number|constant) (?:of )?)?#?{marked}"}
    index = step.mode.name.partition(",")[2]
    place = rf"(?:the )?(?:{step.mode.kind} )?(?:memory )?(?:address|location) {marked}"
    if index:
        place += rf"(?: (?:plus|indexed by|offset by) {REGISTERS[index]}|, ?{index})"
    return {"value": rf"(?:the )?(?:value|contents?|data)(?: stored)? (?:at|of|in|from) {place}", "place": place}


def _flag_statement(flags: str | None, subject: str) -> str:
    if flags is None:
        return ""
    start = rf"(?:\. (?:{subject}|this)(?: also)?|[,;] it|,? and(?: then)?(?: it)?(?: also)?)"
    if not flags:
        denied = rf"{_CHANGES} no flags|does not (?:update|set|affect|change|modify) (?:any|the) flags"
        return rf"(?:{start} (?:{denied})|\. No flags are {_CHANGED}|,? without {_CHANGING} (?:any |the )?flags)"
    exact = _exact_flags(flags)
    return rf"(?:{start} {_CHANGES} {exact}|,? {_CHANGING} {exact}|\. {exact} (?:is|are) {_CHANGED}){_BY_RESULT}"


def _exact_flags(flags: str) -> str:
    """Every flag of `flags`, each once, in any order, and no other: a look-ahead for each, then a list of that length."""
    one = [rf"(?:(?-i:{flag})(?: \({FLAG_NAMES[flag]}\))?|{FLAG_NAMES[flag]}(?: \((?-i:{flag})\))?)" for flag in flags]
    present = "".join(rf"(?=[^.;]*\b{pattern}(?!\w))" for pattern in one)
    listed = r"(?:, (?:and )?|,? and )".join([f"(?:{'|'.join(one)})"] * len(flags))
    return rf"(?:the )?{present}(?:{listed} (?:status )?flags?|flags {listed})"
