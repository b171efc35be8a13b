"""The files of a campaign, and what may be believed of them after a crash.

One process writes. `append` returns only after its lines are on the disk (fsync): what it acknowledged survives kill -9 and power
loss. Lines that arrive while an fsync runs share the next one. A row goes to samples.jsonl or rejected.jsonl first, with all that
its call cost, and to calls.jsonl second: a crash between the two is mended at the next start from the row itself. A torn last
line was never acknowledged and is cut off. A write that fails (a full disk) leaves every file at its last whole line.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import anyio
from anyio import to_thread
from pydantic import JsonValue, ValidationError

from campaigns.spec import CampaignSpec
from config.contracts.base import Tolerant
from config.contracts.sample import Message, Provenance, Sample
from config.errors import ConfigError, SpecChanged, StoreCorrupt, StoreError, StoreHeld, translate_os_errors
from config.files import sync_folder, write_atomic
from config.locks import FileLock, holder
from config.settings import Settings, require_name

M = TypeVar("M", bound=Tolerant)
FREE_TO_CHANGE = ("target", "budget", "lanes", "routing")  # the rest of a spec is what the samples are made of


class Call(Tolerant):
    """One line of calls.jsonl: a finished call. Times are Unix seconds, latency in seconds, cost in USD."""

    task_id: str
    domain: str
    cell: str
    number: int
    verdict: str  # accepted, rejected or failed
    reason: str = ""
    lane: str = ""
    model: str = ""
    attempt: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    cost_assumed: bool = False
    latency_s: float = 0.0
    time: float = 0.0


class Rejected(Tolerant):
    """One line of rejected.jsonl: what the model said, and why it is no sample."""

    id: str
    domain: str
    source_id: str
    reason: str
    messages: list[Message]
    completion: str
    proof: dict[str, JsonValue] = {}
    provenance: Provenance


class CampaignFiles:
    """Paths of a campaign below HAFS_HOME."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self.path = settings.training / require_name(name, "campaign")
        self.samples = self.path / "samples.jsonl"
        self.rejected = self.path / "rejected.jsonl"
        self.calls = self.path / "calls.jsonl"
        self.spec = self.path / "campaign.json"
        self.lock = self.path / "campaign.lock"
        self.log = settings.logs / f"campaign_{name}.log"

    def exists(self) -> bool:
        return self.spec.exists()


class Store:
    """The one writer of a campaign's files. Enter it to take the lock and to mend what a crash left."""

    def __init__(self, files: CampaignFiles, spec: CampaignSpec, version: str) -> None:
        self.files, self._spec, self._version = files, spec, version
        self._lock = FileLock(files.lock)
        self._open: dict[Path, BinaryIO] = {}
        self._pending: list[dict[Path, bytes]] = []
        self._commit = anyio.Lock()
        self._failure: StoreError | None = None

    def __enter__(self) -> "Store":
        """Raises StoreHeld, SpecChanged, StoreCorrupt, DiskFull."""
        if (self.files.path / "pairs.jsonl").exists():
            raise ConfigError(f'"{self.files.name}" is a set of pairs already', hint="give the campaign a name of its own")
        if not self._lock.acquire():
            raise StoreHeld(
                f'campaign "{self.files.name}" is being written by process {holder(self.files.lock)}',
                hint=f"follow it with: hafs campaign logs {self.files.name} -f",
            )
        self._lock.sign()
        try:
            self._check_spec()
            for path in (self.files.samples, self.files.rejected, self.files.calls):
                self._open[path] = _open_whole(path)
            sync_folder(self.files.path)
            self._mend_calls()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def calls(self) -> Iterator[Call]:
        return read_rows(self.files.calls, Call)

    async def append(self, call: Call, row: Sample | Rejected | None) -> None:
        """Write one outcome; returns when it is durable. Raises DiskFull, StoreError with all files whole."""
        entry: dict[Path, bytes] = {}
        if isinstance(row, Sample):
            entry[self.files.samples] = _line(row)
        elif row is not None:
            entry[self.files.rejected] = _line(row)
        entry[self.files.calls] = _line(call)
        self._pending.append(entry)
        with anyio.CancelScope(shield=True):
            async with self._commit:
                if self._failure is None and any(waiting is entry for waiting in self._pending):
                    batch, self._pending = self._pending, []
                    try:
                        await to_thread.run_sync(self._write, batch)
                    except StoreError as error:
                        self._failure = error  # nobody whose line shared this write may believe that it is there
        if self._failure is not None:
            raise self._failure

    def _write(self, batch: list[dict[Path, bytes]]) -> None:
        for path in (self.files.samples, self.files.rejected, self.files.calls):  # the order is the crash contract
            data = b"".join(entry[path] for entry in batch if path in entry)
            if data:
                append_durably(self._open[path], data, path)

    def _check_spec(self) -> None:
        new = self._spec.model_dump(mode="json")
        if self.files.spec.exists():
            old = read_spec(self.files).model_dump(mode="json")
            changed = [key for key in new if key not in FREE_TO_CHANGE and new[key] != old.get(key)]
            if changed:
                raise SpecChanged(
                    f'campaign "{self.files.name}" was started with another {", ".join(changed)}',
                    hint=f"give the new one a name of its own (name = …), or remove {self.files.path} to begin again",
                )
        record = {"spec": new, "hafs": self._version}
        write_atomic(self.files.spec, json.dumps(record, indent=1).encode())

    def _mend_calls(self) -> None:
        """Write the calls whose rows are there but whose own line a crash swallowed."""
        known = {call.task_id for call in self.calls()}
        for path, verdict in ((self.files.samples, "accepted"), (self.files.rejected, "rejected")):
            for row in read_lines(path):
                if row["id"] not in known:
                    known.add(row["id"])
                    append_durably(self._open[self.files.calls], _line(_call_of(row, verdict)), self.files.calls)

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._lock.release()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; a last line without its newline is still being written and is left out.

    Raises:
        StoreCorrupt: a whole line that is no JSON object; names file and line.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _corrupt(path, number) from error
            if not isinstance(row, dict):
                raise _corrupt(path, number)
            yield row


def read_rows(path: Path, model: type[M]) -> Iterator[M]:
    """The rows of a JSONL file as models. Raises StoreCorrupt naming file and line of one that is none."""
    for number, row in enumerate(read_lines(path), 1):
        try:
            yield model.model_validate(row)
        except ValidationError as error:
            raise _corrupt(path, number) from error


def read_spec(files: CampaignFiles) -> CampaignSpec:
    """The spec a campaign was last started with. Raises StoreCorrupt where campaign.json is none, or another version's."""
    try:
        return CampaignSpec.model_validate(json.loads(files.spec.read_text(encoding="utf-8"))["spec"])
    except (ValueError, KeyError, TypeError) as error:
        hint = f"start the campaign with its TOML file under another name, or move {files.path} away"
        raise StoreCorrupt(f"{files.spec}: not the spec of a campaign of this version", hint=hint) from error


def _corrupt(path: Path, number: int) -> StoreCorrupt:
    return StoreCorrupt(f"{path}:{number}: not a row of this file", hint="mend or remove that line; nothing was changed")


def append_durably(file: BinaryIO, data: bytes, path: Path) -> None:
    """Append and fsync; on failure the file is cut back to where it was. Raises DiskFull, StoreError."""
    whole = file.seek(0, os.SEEK_END)
    with translate_os_errors(path):
        try:
            rest = memoryview(data)
            while rest:  # an unbuffered write may take less than all of it
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise


def _open_whole(path: Path) -> BinaryIO:
    """Open for appending, unbuffered, without a torn last line."""
    with translate_os_errors(path):
        file = open(path, "r+b" if path.exists() else "x+b", buffering=0)
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
        return file


def _line(row: Tolerant) -> bytes:
    return row.model_dump_json().encode() + b"\n"


def _call_of(row: dict[str, Any], verdict: str) -> Call:
    made = Provenance.model_validate(row["provenance"])
    return Call(
        task_id=row["id"],
        domain=row["domain"],
        cell=made.cell,
        number=made.number,
        verdict=verdict,
        reason=row.get("reason", ""),
        lane=made.lane,
        model=made.model,
        attempt=made.attempt,
        prompt_tokens=made.prompt_tokens,
        completion_tokens=made.completion_tokens,
        cost_usd=made.cost_usd,
        time=made.created_at,
    )
