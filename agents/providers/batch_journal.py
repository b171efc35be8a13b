"""The journal of a lane's batches: what was sent for money is found again after any crash.

- The intent to create a batch is durable before the server hears of it, under the name it will have there.
- Answers are durable before the batch counts as ended, and stay until every one of them is stored elsewhere.
- The record is written last and removed first: files without a record are leftovers.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.contracts.base import Tolerant, canonical_json
from config.errors import StoreCorrupt, translate_os_errors
from config.files import write_atomic

Json = dict[str, Any]


class BatchRecord(Tolerant):
    """One batch. `requests` are the ids of the requests whose answers are still wanted; `created_at` is in Unix seconds.

    `job`: the server's name for it, empty until that is known. `ended`: the job's last state, empty while it lives.
    `abandoned`: it stalled, and its requests were answered elsewhere.
    """

    display_name: str
    model: str
    created_at: float
    requests: list[str]
    job: str = ""
    ended: str = ""
    abandoned: bool = False


class BatchJournal:
    """A folder with up to three files a batch: its record, the requests until they are sent, the answers once they are there.

    Every method raises DiskFull or StoreError where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> list[BatchRecord]:
        """The records, oldest first; what a crash has left half done is removed.

        Raises:
            StoreCorrupt: a record cannot be read.
        """
        with translate_os_errors(self._folder):
            if not self._folder.exists():
                return []
            records = sorted((_read(path) for path in self._folder.glob("[!.]*.json")), key=lambda record: record.created_at)
            names = {record.display_name for record in records}
            for path in self._folder.iterdir():
                if path.name.startswith(".") or path.name.split(".")[0] not in names:
                    path.unlink()
        return records

    def intend(self, record: BatchRecord, requests: Mapping[str, Json]) -> None:
        """Make a batch and its requests durable before it is created."""
        write_atomic(self.requests(record.display_name), _lines({"key": key, "request": body} for key, body in requests.items()))
        self.write(record)

    def write(self, record: BatchRecord) -> None:
        write_atomic(self._path(record.display_name, "json"), record.model_dump_json(indent=1).encode())
        if record.job:
            self._unlink(self.requests(record.display_name))

    def end(self, record: BatchRecord, answers: bytes) -> None:
        """Keep the lines that the server answered with, then say that the batch has ended."""
        write_atomic(self._path(record.display_name, "answers.jsonl"), answers)
        self.write(record)

    def answers(self, name: str) -> bytes:
        """What `end` kept."""
        path = self._path(name, "answers.jsonl")
        with translate_os_errors(path):
            return path.read_bytes()

    def requests(self, name: str) -> Path:
        """The file to send: JSON lines with `key` and `request`."""
        return self._path(name, "requests.jsonl")

    def drop(self, name: str) -> None:
        """Forget a batch."""
        for kind in ("json", "requests.jsonl", "answers.jsonl"):
            self._unlink(self._path(name, kind))

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{name}.{kind}"

    def _unlink(self, path: Path) -> None:
        with translate_os_errors(path):
            path.unlink(missing_ok=True)


def _read(path: Path) -> BatchRecord:
    try:
        record = BatchRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreCorrupt(f"{path} is no record of a batch: {error.errors()[0]['msg']}", hint=_CORRUPT) from error
    if record.display_name != path.stem:
        raise StoreCorrupt(f"{path} is the record of another batch: {record.display_name!r}", hint=_CORRUPT)
    return record


_CORRUPT = "look for the batch at https://aistudio.google.com, then remove the file: what it names may be paid again"


def _lines(values: Iterable[Json]) -> bytes:
    return b"".join(canonical_json(value) + b"\n" for value in values)


def parse_answers(lines: bytes) -> dict[str, Json]:
    """The lines of an answer file by their keys. Raises ValueError where one is no JSON; lines without a key are left out."""
    answers = (json.loads(line) for line in lines.splitlines() if line.strip())
    return {str(answer["key"]): answer for answer in answers if isinstance(answer, dict) and "key" in answer}
