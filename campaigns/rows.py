"""Reading JSONL files that another process may be writing: a last line without its newline is on its way and is left out."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from config.contracts.base import Tolerant
from config.errors import StoreCorrupt

M = TypeVar("M", bound=Tolerant)
Row = dict[str, Any]
_BLOCK = 2**18
_PRINT_BYTES = 4096


def read_lines(path: Path, start: int = 0, number: int = 0) -> Iterator[Row]:
    """The rows of a file from byte `start` on, where a line begins; `number` lines are before it.

    Raises:
        StoreCorrupt: a whole line that is no JSON object; names file and line.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        for at, line in enumerate(file, number + 1):
            if not line.endswith(b"\n"):
                return
            yield _row(line, path, at)


def read_rows(path: Path, model: type[M]) -> Iterator[M]:
    """The rows of a file as models. Raises StoreCorrupt naming file and line of one that is none."""
    for number, row in enumerate(read_lines(path), 1):
        try:
            yield model.model_validate(row)
        except ValidationError as error:
            raise corrupt(path, number) from error


def read_blocks(path: Path, start: int = 0, number: int = 0) -> Iterator[list[Row]]:
    """The same rows as `read_lines`, many at a time: a million of them are read in half the time."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        while lines := file.readlines(_BLOCK):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            yield _rows(lines, path, number)
            number += len(lines)


def _rows(lines: list[bytes], path: Path, number: int) -> list[Row]:
    rows: list[Row] = []
    try:
        rows = from_json(b"[" + b",".join(lines) + b"]")  # twice as fast as the json module
    except ValueError:
        pass  # one of them is not whole, and is named below
    if len(rows) == len(lines) and all(type(row) is dict for row in rows):
        return rows
    return [_row(line, path, number) for number, line in enumerate(lines, number + 1)]


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise corrupt(path, number) from error
    if not isinstance(row, dict):
        raise corrupt(path, number)
    return row


def corrupt(path: Path, number: int) -> StoreCorrupt:
    """The error for line `number` (from 1) of a file."""
    return StoreCorrupt(f"{path}:{number}: not a row of this file", hint="mend or remove that line; nothing was changed")


def after_lines(path: Path, start: int, count: int) -> int | None:
    """The byte behind `count` lines from byte `start` on; None where there are fewer."""
    if not path.exists():
        return None if count else start
    with open(path, "rb") as file:
        file.seek(start)
        while count and (block := file.read(4 * _BLOCK)):
            newlines = block.count(b"\n")
            if newlines < count:
                start, count = start + len(block), count - newlines
                continue
            at = -1
            for _ in range(count):
                at = block.index(b"\n", at + 1)
            start, count = start + at + 1, 0
    return None if count else start


def since(path: Path, moment: float) -> Iterator[Row]:
    """The rows whose `time` (Unix seconds) is at least `moment`, of a file whose times grow: found by bisection."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        low, high = 0, file.seek(0, os.SEEK_END)
        while high - low > _BLOCK:
            middle = (low + high) // 2
            file.seek(middle)
            file.readline()
            start, line = file.tell(), file.readline()
            if line.endswith(b"\n") and _row(line, path, 0).get("time", 0.0) < moment:
                low = start
            else:
                high = middle
    for rows in read_blocks(path, low):
        yield from (row for row in rows if row.get("time", 0.0) >= moment)


def fingerprint(path: Path, end: int) -> bytes:
    """The last bytes before `end`: enough to know that a file is still the one it was."""
    with open(path, "rb") as file:
        file.seek(max(0, end - _PRINT_BYTES))
        return file.read(min(end, _PRINT_BYTES))


def following(before: bytes, data: bytes) -> bytes:
    """The fingerprint of a file whose own was `before`, and to which `data` was added."""
    return (before + data)[-_PRINT_BYTES:]
