"""What earlier runs have done, told from a campaign's files.

Rows are written before their calls, in the same order: the k-th accepted call belongs to the k-th row of samples.jsonl, the
k-th rejected one to the k-th row of rejected.jsonl. So lines are counted, and only those rows are read whose calls a crash has
swallowed. Where a person has edited the files this does not hold; then the ids of all rows are read. A sample that was taken out
is no longer accepted: its call counts as rejected ("removed"), and the campaign makes another one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from campaigns.index import CALLS, REJECTED, SAMPLES, Snapshot, load
from campaigns.rows import Row, after_lines, corrupt, read_blocks, read_lines
from campaigns.seen import Seen, answer_id
from campaigns.tally import Tally

REMOVED = "removed"


@dataclass(frozen=True)
class Owed:
    """A row whose call has no line, and the verdict that its file stands for."""

    row: Row
    verdict: str


@dataclass(frozen=True)
class Restored:
    """`tally` counts the calls that have lines, not the `owed` ones. `read` lines were read for it: the index spared the rest."""

    tally: Tally
    owed: Iterator[Owed]
    read: int


@dataclass
class _Tail:
    """The calls behind a snapshot: how many rows each verdict has, and the id of the last one."""

    rows: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "rejected": 0})
    last: dict[str, str] = field(default_factory=dict)
    answers_known: bool = True

    def count(self, call: Row) -> None:
        verdict = call["verdict"]
        if verdict in self.rows:
            self.rows[verdict] += 1
            self.last[verdict] = call["task_id"]
            self.answers_known &= verdict == "rejected" or bool(call.get("answer"))


def count_calls(folder: Path) -> Tally:
    """The tally as calls.jsonl alone tells it, without the answers: for those who only look.

    Raises:
        StoreCorrupt: a line of it is no call.
    """
    snapshot = load(folder, with_answers=False)
    _replay(folder, snapshot)
    return snapshot.tally


def restore(folder: Path) -> Restored:
    """The tally of a campaign that nobody writes meanwhile.

    Raises:
        StoreCorrupt: a line of a file is no row; file and line are named. Also where `owed` comes to such a line.
    """
    snapshot = load(folder, with_answers=True)
    covered = snapshot.tally.calls
    tail = _replay(folder, snapshot)
    samples = _first_owed(folder / SAMPLES, snapshot, tail, "accepted")
    rejected = _first_owed(folder / REJECTED, snapshot, tail, "rejected")
    if samples is None or rejected is None or not tail.answers_known:
        del snapshot  # a large table, of which there will be another one
        return _recount(folder, tail.answers_known)
    owed = _rows(folder, lambda _: True, samples, rejected)
    return Restored(snapshot.tally, owed, snapshot.tally.calls - covered)


def _replay(folder: Path, snapshot: Snapshot) -> _Tail:
    """Count the calls behind the snapshot into its tally."""
    tail, tally = _Tail(), snapshot.tally
    for number, call in _each(folder / CALLS, snapshot.end(CALLS), tally.calls):
        try:
            tally.count(call)
            tail.count(call)
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(folder / CALLS, number) from error
    return tail


def _first_owed(path: Path, snapshot: Snapshot, tail: _Tail, verdict: str) -> int | None:
    """The byte behind the rows whose calls are known; None where these rows are not those of the calls."""
    start, count = snapshot.end(path.name), tail.rows[verdict]
    if count == 0:
        return start
    last = after_lines(path, start, count - 1)
    if last is None or next(read_lines(path, last), {}).get("id") != tail.last[verdict]:
        return None
    return after_lines(path, last, 1)


def _recount(folder: Path, answers_known: bool) -> Restored:
    """The same from the ids of all rows; also from their answers, if the calls do not name them."""
    tally, rows = Tally(), _keys(folder, (SAMPLES, REJECTED))
    if not answers_known:
        _add_answers(folder / SAMPLES, tally.answers)
    for number, call in _each(folder / CALLS):
        try:
            key = _key(call["task_id"])
            removed = call["verdict"] == "accepted" and key not in rows
            rows.discard(key)  # what is left at the end has no call
            tally.count({**call, "verdict": "rejected", "reason": REMOVED} if removed else call)
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(folder / CALLS, number) from error
    owed = _rows(folder, lambda row: _key(row["id"]) in rows) if rows else iter(())
    return Restored(tally, owed, tally.calls)


def _keys(folder: Path, names: Iterable[str]) -> set[int]:
    """The ids of all rows of some files, each as a number."""
    keys: set[int] = set()
    for name in names:
        for number, row in _each(folder / name):
            try:
                keys.add(_key(row["id"]))
            except (KeyError, TypeError) as error:
                raise corrupt(folder / name, number) from error
    return keys


def _key(task_id: str) -> int:
    """A small number in place of an id: a million of them fit in memory, and hardly ever (n / 2^60) are two the same."""
    return hash(task_id) & (2**60 - 1)


def _add_answers(path: Path, answers: Seen) -> None:
    for number, row in _each(path):
        try:
            answers.add(int(answer_id(row["source_id"], row["completion"]), 16))
        except KeyError as error:
            raise corrupt(path, number) from error


def _rows(folder: Path, wanted: Callable[[Row], bool], samples: int = 0, rejected: int = 0) -> Iterator[Owed]:
    """Rows from these bytes on."""
    for name, start, verdict in ((SAMPLES, samples, "accepted"), (REJECTED, rejected, "rejected")):
        for row in read_lines(folder / name, start):
            if wanted(row):
                yield Owed(row, verdict)


def _each(path: Path, start: int = 0, number: int = 0) -> Iterator[tuple[int, Row]]:
    """Rows with the numbers of their lines."""
    for rows in read_blocks(path, start, number):
        yield from enumerate(rows, number + 1)
        number += len(rows)
