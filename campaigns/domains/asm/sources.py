"""Items from a person's own assembly files.

The text is untrusted: a line counts only if the whole of it is an optional label, one known instruction with a hex operand of a
known mode, and a comment. Everything else is passed over. What benchmarks hold out (operands and pairs) is never taken.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from campaigns.domains.asm.catalogue import MODES, Mode, catalogue
from campaigns.domains.asm.items import make_item, reserved
from campaigns.domains.base import SourceItem
from config.errors import SourceMissing

MAX_LINE_CHARS = 400
WIDTHS = {"b": 2, "w": 4, "l": 6}
_LINE = re.compile(
    r"\s*(?:#?[.@]?\w{1,80}:)?\s*(?P<mnemonic>[A-Za-z]{3})(?:\.(?P<width>[bwlBWL]))?"
    r"(?:[ \t]+(?P<immediate>#)?\$(?P<digits>[0-9A-Fa-f]{2,6})(?P<index>,[ \t]?[xXyY])?)?\s*(?:;.*)?"
)


def source_cells(sources: Sequence[Path]) -> list[str]:
    """The forms that occur in the files, those with most items first.

    Raises:
        SourceMissing: a file does not exist or cannot be read.
    """
    found = _read(_stamps(sources))
    return sorted(found, key=lambda cell: (-len(found[cell]), cell))


def source_item(cell: str, number: int, sources: Sequence[Path]) -> SourceItem | None:
    """The number-th item of a cell in the order of the files; None past its end. Raises SourceMissing as `source_cells` does."""
    items = _read(_stamps(sources)).get(cell, ())
    return items[number] if number < len(items) else None


def parse_line(line: str) -> SourceItem | None:
    """The item a line of source text holds, None if it holds none that may be trained on."""
    match = _LINE.fullmatch(line.rstrip("\r\n")) if len(line) <= MAX_LINE_CHARS else None
    if not match:
        return None
    operand = f"${match['digits'].upper()}" if match["digits"] else ""
    mode = _mode(match, operand)
    form = catalogue().forms.get(f"{match['mnemonic'].upper()} {mode.name}") if mode else None
    if form is None or form.name in catalogue().unseen_pairs or (operand and reserved(operand)):
        return None
    return make_item(form, [operand] if operand else [])


def _mode(match: re.Match[str], operand: str) -> Mode | None:
    digits = len(operand[1:])
    if match["width"] and WIDTHS[match["width"].lower()] != digits:
        return None
    if not operand:
        return MODES["implied"]
    index = match["index"][-1].upper() if match["index"] else ""
    for mode in MODES.values():
        immediate = not mode.place
        same_index = mode.name.partition(",")[2] == index
        if digits in mode.digits and immediate == bool(match["immediate"]) and same_index:
            return mode
    return None


def _stamps(sources: Sequence[Path]) -> tuple[tuple[Path, int, int], ...]:
    """Path, time and size of every file: an edited file is read again."""
    try:
        return tuple((path, stat.st_mtime_ns, stat.st_size) for path in sources for stat in [path.stat()])
    except OSError as error:
        raise SourceMissing(
            f"{error.filename}: cannot be read: {error.strerror}", hint="check [sources] of the campaign"
        ) from error


@lru_cache(maxsize=4)
def _read(stamps: tuple[tuple[Path, int, int], ...]) -> dict[str, tuple[SourceItem, ...]]:
    found: dict[str, dict[str, SourceItem]] = {}
    for path, _, _ in stamps:
        for item in _items_of(path):
            found.setdefault(item.cell, {}).setdefault(item.id, item)
    return {cell: tuple(items.values()) for cell, items in found.items()}


def _items_of(path: Path) -> Iterator[SourceItem]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from (item for line in lines if (item := parse_line(line)))
    except OSError as error:
        raise SourceMissing(f"{path}: cannot be read: {error.strerror}", hint="check [sources] of the campaign") from error
