"""Which answers there are already, in 10 to 20 bytes each.

Only 64 bits of an answer's SHA-256 are kept, so a new answer can be taken for one that is there: with n answers the chance is
n / 2^64, which is one in 18 million million for a million answers. The sample is then rejected as a duplicate, nothing else.
"""

from array import array
from collections.abc import Iterable

from config.contracts.base import content_id

_LEAST_SLOTS = 1024


def answer_id(source_id: str, completion: str) -> str:
    """Names what a sample says about a fact: 64 bits in hex. The same answer to the same question teaches nothing new."""
    return content_id([source_id, completion])[:16]


class Seen:
    """A set of 64-bit hashes: open addressing in one array, at most four fifths full. Zero marks a free slot."""

    def __init__(self, slots: "array[int] | None" = None, count: int = 0) -> None:
        """`slots` and `count` are those of another table, kept meanwhile as bytes."""
        self.slots = slots or array("Q", bytes(8 * _LEAST_SLOTS))
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self.slots[_place(self.slots, value or 1)] != 0

    def add(self, value: int) -> None:
        place = _place(self.slots, value or 1)
        if self.slots[place]:
            return
        self.slots[place] = value or 1
        self._count += 1
        if 5 * self._count > 4 * len(self.slots):
            self.slots = _table(self.slots, 2 * len(self.slots))


def _table(values: Iterable[int], slots: int) -> "array[int]":
    made = array("Q", bytes(8)) * slots
    for value in values:
        if value:
            made[_place(made, value)] = value
    return made


def _place(slots: "array[int]", value: int) -> int:
    """Where the value is, or the free slot that it would take."""
    mask = len(slots) - 1
    place = value & mask
    while (there := slots[place]) and there != value:
        place = (place + 1) & mask
    return place
