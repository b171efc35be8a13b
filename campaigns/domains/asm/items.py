"""Items of the corpus and of the benchmarks.

An operand is reserved or it is not, by a hash of its text alone: benchmarks use reserved operands only, training never has one.
Order and operands come from hashes, so every process makes the same items.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256

from pydantic import JsonValue

from campaigns.domains.asm.catalogue import REGISTER_NAMES, Form, Mode, catalogue
from campaigns.domains.base import SourceItem
from config.errors import ConfigError

RESERVED_SHARE = 5  # one operand in five
DEMO_OPERANDS = ("$10",)  # asked for in the documentation, so reserved whatever its hash says
UNSEEN_OPERANDS = "unseen-operands"
UNSEEN_PAIRS = "unseen-pairs"
MAX_OPERANDS = 4096  # a cell's items, so that a search for the next free operand ends


def reserved(operand: str) -> bool:
    """Whether the operand belongs to the benchmarks."""
    return operand in DEMO_OPERANDS or _number("reserve", operand) % RESERVED_SHARE == 0


def make_item(form: Form, operands: Sequence[str], cell: str = "") -> SourceItem:
    """The item of a form with its operands: id and code are the source text, the fact is exact."""
    code = form.code(list(operands))
    fact = f"{code} {form.wordings[0].format(**spoken_slots(form, operands))}."
    if form.flags is not None:
        fact += f" It {flags_clause(form.flags)}."
    details: dict[str, JsonValue] = {"form": form.name, "operands": list(operands)}
    return SourceItem(code, cell or form.name, f"What does {code} do?", fact, details)


def form_of(item: SourceItem) -> Form:
    return catalogue().forms[str(item.details["form"])]


def operands_of(item: SourceItem) -> list[str]:
    operands = item.details["operands"]
    return [str(operand) for operand in operands] if isinstance(operands, list) else []


def spoken_slots(form: Form, operands: Sequence[str]) -> dict[str, str]:
    """What the slots of the first wording stand for. A single instruction's slots have no number."""
    slots = {"register": REGISTER_NAMES.get(form.register, ""), "target": REGISTER_NAMES.get(form.target, "")}
    left = iter(operands)
    for number, step in enumerate(form.steps, 1):
        if step.mode.digits:
            operand = next(left)
            place = step.mode.place.format(operand=operand)
            value = f"the value at {place}" if place else f"the immediate value {operand}"
            slots |= {f"value{number}": value, f"place{number}": place}
            slots |= {"value": value, "place": place} if len(form.steps) == 1 else {}
    return slots


def flags_clause(flags: str) -> str:
    if not flags:
        return "changes no flags"
    if len(flags) == 1:
        return f"updates the {flags} flag"
    return f"updates the {', '.join(flags[:-1])} and {flags[-1]} flags"


def corpus_item(cell: str, number: int) -> SourceItem | None:
    """The number-th training item of a cell of the shipped corpus; None past its end.

    Raises:
        ConfigError: the corpus has no such cell.
    """
    names = catalogue().cells.get(cell)
    if names is None:
        raise ConfigError(f'the asm corpus has no cell "{cell}"', hint=f"its cells: {', '.join(catalogue().cells)}")
    form = catalogue().forms[names[number % len(names)]]
    turn = number // len(names)
    if not form.operand_steps:
        return make_item(form, (), cell) if turn == 0 else None
    rows = _rows(form, False)
    return make_item(form, rows[turn], cell) if turn < len(rows) else None


def benchmark_items(name: str, count: int) -> list[SourceItem]:
    """The first `count` items of a held-out set, its forms in turn.

    Raises:
        ConfigError: no such set.
    """
    corpus = catalogue()
    trained = [form for cell in corpus.cells.values() for form in cell if corpus.forms[form].operand_steps]
    sets = {UNSEEN_OPERANDS: trained, UNSEEN_PAIRS: list(corpus.unseen_pairs)}
    if name not in sets:
        raise ConfigError(f'asm has no benchmark set "{name}"', hint=f"its sets: {', '.join(sets)}")
    items: list[SourceItem] = []
    for turn in range(MAX_OPERANDS):
        for form in (corpus.forms[form] for form in sets[name]):
            if len(items) == count:
                return items
            if turn < len(rows := _rows(form, True)):
                items.append(make_item(form, rows[turn]))
    return items


@cache
def _rows(form: Form, wanted: bool) -> tuple[tuple[str, ...], ...]:
    """Operands for each item of a form, all of them reserved or none; the column of every step in its own order."""
    columns = [_column(f"{form.name}/{place}", step.mode, wanted) for place, step in enumerate(form.operand_steps)]
    return tuple(zip(*columns, strict=False))


def _column(key: str, mode: Mode, wanted: bool) -> list[str]:
    digits = mode.digits[0]  # 8-bit immediates: the shortest form
    space = 16**digits
    if space <= MAX_OPERANDS:
        values: Iterator[int] = iter(sorted(range(space), key=lambda value: _number(key, str(value))))
    else:
        values = iter(dict.fromkeys(_number(key, str(draw)) % space for draw in range(MAX_OPERANDS)))
    operands = (f"${value:0{digits}X}" for value in values)
    return [operand for operand in operands if reserved(operand) is wanted]


def _number(*key: str) -> int:
    return int.from_bytes(sha256("/".join(key).encode()).digest()[:8], "big")
