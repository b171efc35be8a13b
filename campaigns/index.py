"""The tally of a campaign, saved beside its files so that a restart need not read a million rows.

It is a cache and is never believed blindly: it says which bytes of the three files it covers, and how these bytes end. What comes
after them is counted from calls.jsonl; an index that does not fit the files, or is torn, is left aside and all of it is counted.
It is renamed into place and not synced: losing it costs time only.

The file is two lines (the SHA-256 of the second, then JSON) and the table of the answers' hashes as it is in memory.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from campaigns.rows import fingerprint
from campaigns.seen import Seen
from campaigns.tally import Tally

SAMPLES, REJECTED, CALLS = "samples.jsonl", "rejected.jsonl", "calls.jsonl"  # in the order in which a call is written
INDEX = "calls.index"
_VERSION = 1


@dataclass
class Snapshot:
    """A tally and the bytes of each file (by its name) that it covers; 0 where it is not named."""

    tally: Tally = field(default_factory=Tally)
    ends: dict[str, int] = field(default_factory=dict)

    def end(self, name: str) -> int:
        return self.ends.get(name, 0)


def save(folder: Path, snapshot: Snapshot) -> None:
    """Write the index of a campaign's folder. Raises OSError; the old one is untouched then."""
    answers = snapshot.tally.answers
    table = memoryview(answers.slots).cast("B")
    head = {
        "version": _VERSION,
        "byteorder": sys.byteorder,
        "files": {name: [end, _print(folder / name, end)] for name, end in snapshot.ends.items()},
        "tally": snapshot.tally.dump(),
        "answers": {"slots": len(answers.slots), "count": len(answers), "sha256": hashlib.sha256(table).hexdigest()},
    }
    text = json.dumps(head).encode()
    part = folder / f".{INDEX}.part"
    try:
        with open(part, "wb") as file:
            file.write(b"%s\n%s\n" % (hashlib.sha256(text).hexdigest().encode(), text))
            file.write(table)
        os.replace(part, folder / INDEX)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def load(folder: Path, *, with_answers: bool) -> Snapshot:
    """The last snapshot that fits the files beside it; an empty one where there is none.

    `with_answers` False: the table of answers stays empty, for those who only look.
    """
    with suppress(OSError, EOFError, ValueError, KeyError, TypeError):  # whatever is wrong with it: the files have it all
        with open(folder / INDEX, "rb") as file:
            head = _head(file)
            ends = {name: end for name, (end, last) in head["files"].items() if _print(folder / name, end) == last}
            if len(ends) == len(head["files"]):
                return Snapshot(Tally.load(head["tally"], _answers(file, head["answers"]) if with_answers else Seen()), ends)
    return Snapshot()


def _head(file: BinaryIO) -> dict[str, Any]:
    check, text = file.readline().strip(), file.readline().strip()
    head = json.loads(text)
    if hashlib.sha256(text).hexdigest().encode() != check or not isinstance(head, dict) or head["version"] != _VERSION:
        raise ValueError("torn, or of another version")
    return head


def _answers(file: BinaryIO, about: Mapping[str, Any]) -> Seen:
    slots: array[int] = array("Q")
    slots.fromfile(file, about["slots"])
    if hashlib.sha256(memoryview(slots).cast("B")).hexdigest() != about["sha256"]:
        raise ValueError("torn")
    return Seen(slots, about["count"])


def _print(path: Path, end: int) -> str:
    return hashlib.sha256(fingerprint(path, end)).hexdigest()
