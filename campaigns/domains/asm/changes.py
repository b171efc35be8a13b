"""Controlled corruptions of a right answer: each breaks one fact and leaves the rest of the text as it was."""

import re
from collections.abc import Iterator

from campaigns.domains.asm.catalogue import Form
from campaigns.domains.asm.grammar import FLAG_NAMES
from campaigns.domains.asm.items import form_of, operands_of
from campaigns.domains.base import Change, SourceItem

_VERBS = {
    "loads": "stores",
    "stores": "loads",
    "adds": "subtracts",
    "subtracts": "adds",
    "increments": "decrements",
    "decrements": "increments",
    "compares": "adds",
    "AND": "OR",
    "OR": "XOR",
    "XOR": "AND",
    "ANDs": "ORs",
    "ORs": "XORs",
    "XORs": "ANDs",
    "pushes": "pulls",
    "pulls": "pushes",
    "pops": "pushes",
    "copies": "compares",
    "transfers": "compares",
    "left": "right",
    "right": "left",
    "tests": "stores",
    "clears": "sets",
    "sets": "clears",
}
_REGISTERS = {"accumulator": "X register", "X register": "Y register", "Y register": "X register", "stack pointer": "Y register"}
_PLACES = {
    r"immediate value (\$\w+)": r"value at address \1",
    r"the value at (?:direct page |absolute |long )?address (\$\w+)": r"the immediate value \1",
    r"at direct page address (\$\w+)": r"at absolute address \1",
    r"at (?:absolute |long )?address (\$\w+)": r"at direct page address \1",
}
_FLAG_LIST = re.compile(r"\b[NVZC](?:(?:, and |, | and )[NVZC])* flags?\b")


def changes(item: SourceItem, text: str) -> Iterator[Change]:
    """Wrong variants of an accepted answer, by name: operand, register, flag-added, flag-dropped, effect, place."""
    form = form_of(item)
    yield from _operand(item, text)
    yield from _swapped("register", _REGISTERS, item, text)
    yield from _flags(form, text)
    yield from _swapped("effect", _VERBS, item, text)
    for pattern, replacement in _PLACES.items():
        changed, count = re.subn(pattern, replacement, text, count=1)
        if count:
            yield Change("place", changed)
            return


def _operand(item: SourceItem, text: str) -> Iterator[Change]:
    """The last operand with its last digit one higher, wherever the text names it."""
    if operands := operands_of(item):
        digit = f"{(int(operands[-1][-1], 16) + 1) % 16:X}"
        changed = text.replace(operands[-1], operands[-1][:-1] + digit)
        if changed != text:
            yield Change("operand", changed)


def _swapped(name: str, words: dict[str, str], item: SourceItem, text: str) -> Iterator[Change]:
    """The first of `words` after the source text of the item, which may hold such a word itself (AND), exchanged."""
    head, code, tail = text.rpartition(item.id)
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\b")
    changed, count = pattern.subn(lambda match: words[match[0]], tail, count=1)
    if count:
        yield Change(name, head + code + changed)


def _flags(form: Form, text: str) -> Iterator[Change]:
    if form.flags is None:
        return
    if not form.flags:
        changed = re.sub(r"\bno flags\b", "the N and Z flags", text)
        if changed != text:
            yield Change("flag-added", changed)
        return
    if not _FLAG_LIST.search(text):
        return
    missing = [flag for flag in FLAG_NAMES if flag not in form.flags]
    if missing:
        yield Change("flag-added", _FLAG_LIST.sub(_listed(form.flags + missing[0]), text, count=1))
    yield Change("flag-dropped", _FLAG_LIST.sub(_listed(form.flags[:-1]), text, count=1))


def _listed(flags: str) -> str:
    return f"{flags} flag" if len(flags) == 1 else f"{', '.join(flags[:-1])} and {flags[-1]} flags"
