"""The files of a campaign, and what may be believed of them after a crash.

One process writes. `append` returns only after its lines are on the disk (fsync): what it acknowledged survives kill -9 and power
loss. Lines that arrive while an fsync runs share the next one. A row goes to samples.jsonl or rejected.jsonl first, with all that
its call cost, and to calls.jsonl second: a crash between the two is mended at the next start from the row itself. A torn last
line was never acknowledged and is cut off. A write that fails leaves every file at its last whole line; where time may mend what
is wrong (a full disk, a folder that is not there) `append` waits and tries again, and nothing is lost meanwhile.
"""

import errno
import json
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import TracebackType

import anyio
from anyio import to_thread
from pydantic import JsonValue, ValidationError

from campaigns.index import CALLS, REJECTED, SAMPLES, Snapshot, save
from campaigns.restore import Owed, restore
from campaigns.rowfile import RowFile
from campaigns.seen import answer_id
from campaigns.spec import CampaignSpec
from campaigns.tally import Tally
from config.contracts.base import Tolerant
from config.contracts.sample import Message, Provenance, Sample
from config.errors import ConfigError, DiskFull, SpecChanged, StoreCorrupt, StoreError, StoreHeld, translate_os_errors
from config.files import sync_folder, write_atomic
from config.locks import FileLock, holder
from config.settings import Settings, require_name

log = logging.getLogger("hafs.campaign")

FREE_TO_CHANGE = ("target", "budget", "lanes", "routing", "notify", "observe")  # the rest is what the samples are made of
INDEX_EVERY = 20_000  # calls; with more than a million of them, 2 % of what there is, so that saving costs little
_MENDED_AT_ONCE = 1000
_LONGEST_WAIT_S = 15.0
_MAY_PASS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EBUSY
}  # fmt: skip


class Call(Tolerant):
    """One line of calls.jsonl: a finished call. Times are Unix seconds, latency in seconds, cost in USD.

    `reason` is a short stable word, `detail` what was said about it. `answer` names what an accepted sample says (see
    campaigns.seen), so that samples.jsonl need not be read to know it.
    """

    task_id: str
    domain: str
    cell: str
    number: int
    verdict: str  # accepted, rejected or failed
    reason: str = ""
    detail: str = ""
    answer: str = ""
    lane: str = ""
    provider: str = ""
    model: str = ""
    attempt: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    cached_tokens: int = 0
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
        self.samples = self.path / SAMPLES
        self.rejected = self.path / REJECTED
        self.calls = self.path / CALLS
        self.spec = self.path / "campaign.json"
        self.reserved = self.path / "reserved.json"
        self.lock = self.path / "campaign.lock"
        self.log = settings.logs / f"campaign_{name}.log"

    def exists(self) -> bool:
        return self.spec.exists()


class Store:
    """The one writer of a campaign's files. Enter it to take the lock and to mend what a crash left.

    `tally` is what the files say: it counts what is on the disk, nothing else.

    Args:
        version: of hafs, for campaign.json.
        folder: where relative sources of the spec start, for campaign.json.
        on_pause: told once when a write fails and is tried again from then on; by the event loop's thread.
        on_resume: called when it has gone through after all.
    """

    def __init__(
        self,
        files: CampaignFiles,
        spec: CampaignSpec,
        version: str,
        folder: Path = Path("."),
        *,
        on_pause: Callable[[StoreError], None] = lambda error: None,
        on_resume: Callable[[], None] = lambda: None,
    ) -> None:
        self.files, self._spec = files, spec
        self._record = {"hafs": version, "folder": str(folder.resolve())}
        self.tally = Tally()
        self._on_pause, self._on_resume = on_pause, on_resume
        self._lock = FileLock(files.lock)
        self._samples, self._rejected, self._calls = RowFile(files.samples), RowFile(files.rejected), RowFile(files.calls)
        self._all = (self._samples, self._rejected, self._calls)  # the order in which they are written is the crash contract
        self._claimed: set[int] = set()
        self._indexed = 0  # calls that the index covers
        self._ends: dict[str, int] = {}  # of the files, where the tally counts exactly what is before them
        self._pending: list[tuple[Call, dict[RowFile, bytes]]] = []
        self._arrived = self._taken = 0  # appends that came, and those that a commit has taken
        self._commit = anyio.Lock()
        self._failure: StoreError | None = None
        self._given_up = anyio.Event()

    def __enter__(self) -> "Store":
        """Raises StoreHeld, SpecChanged, StoreCorrupt, DiskFull, StoreError."""
        if (self.files.path / "pairs.jsonl").exists():
            raise ConfigError(f'"{self.files.name}" is a set of pairs already', hint="give the campaign a name of its own")
        self._take_lock()
        try:
            self._check_spec()
            with translate_os_errors(self.files.path):
                for file in self._all:
                    file.open()
                self._sync_folders()
            self._restore()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.tally.calls > self._indexed:
            self._save_index()
        self._close()

    def claim(self, answer: str) -> bool:
        """Take an answer (its `answer_id`) for a sample that is about to be written; False: another sample has it already."""
        value = int(answer, 16)
        if value in self._claimed or value in self.tally.answers:
            return False
        self._claimed.add(value)
        return True

    async def append(self, call: Call, row: Sample | Rejected | None) -> None:
        """Write one outcome; returns when it is durable. While it cannot be written and that may pass, it waits.

        Raises:
            DiskFull, StoreError: it cannot be written, or `give_up` was called while it could not. All files are whole, and
                no later append succeeds.
        """
        lines: dict[RowFile, bytes] = {}
        if row is not None:
            lines[self._samples if isinstance(row, Sample) else self._rejected] = _line(row)
        lines[self._calls] = _line(call)
        self._pending.append((call, lines))
        self._arrived += 1
        number = self._arrived
        with anyio.CancelScope(shield=True):
            async with self._commit:
                if self._failure is None and number > self._taken:
                    await self._commit_pending()
        if self._failure is not None:
            raise self._failure

    def ends_with(self, call: Call) -> bool:
        """Whether the last line of calls.jsonl is of that call."""
        return f'"task_id":"{call.task_id}"'.encode() in self._calls.last_line

    def give_up(self) -> None:
        """Wait no longer for a write that fails: who waits in `append` gets the error. For the event loop's thread."""
        self._given_up.set()

    # --- writing -----------------------------------------------------------------------------------------------------

    async def _commit_pending(self) -> None:
        batch, self._pending, self._taken = self._pending, [], self._arrived
        todo = {file: b"".join(lines[file] for _, lines in batch if file in lines) for file in self._all}
        self._failure = StoreError(f"{self.files.path}: a write was cut off")  # until it is done, whatever happens
        try:
            await self._write_in_the_end({file: data for file, data in todo.items() if data})
        except StoreError as error:
            self._failure = error  # nobody whose line shared this write may believe that it is there
            return
        self._failure = None
        for call, _ in batch:
            self._count(call)
        self._ends = {file.path.name: file.end for file in self._all}
        if self.tally.calls - self._indexed >= max(INDEX_EVERY, self.tally.calls // 50):
            await to_thread.run_sync(self._save_index)

    def _count(self, call: Call) -> None:
        self.tally.count(vars(call))
        if call.answer:
            self._claimed.discard(int(call.answer, 16))

    async def _write_in_the_end(self, todo: dict[RowFile, bytes]) -> None:
        """Write, now or as soon as it is possible. Raises StoreError where waiting does not help, or was given up."""
        try:
            await to_thread.run_sync(self._write, todo)
            return
        except StoreError as error:
            if not _may_pass(error) or self._given_up.is_set():
                raise
            self._on_pause(error)
        await self._nap(0.25)
        await self._keep_trying(todo)
        self._on_resume()

    async def _keep_trying(self, todo: dict[RowFile, bytes]) -> None:
        from tenacity import AsyncRetrying, retry_if_exception, wait_exponential  # not needed on a good day

        attempts = AsyncRetrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_exponential(multiplier=0.5, max=_LONGEST_WAIT_S),
            stop=lambda _: self._given_up.is_set(),
            sleep=self._nap,
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                await to_thread.run_sync(self._write_again, todo)

    async def _nap(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._given_up.wait()

    def _write(self, todo: dict[RowFile, bytes]) -> None:
        """Write what is to be done and take it off, file by file."""
        for file in list(todo):
            with translate_os_errors(file.path):
                file.append(todo[file])
            del todo[file]

    def _write_again(self, todo: dict[RowFile, bytes]) -> None:
        with translate_os_errors(self.files.path):
            if not self.files.path.exists() and not any(file.end for file in self._all):
                self._begin_anew()
            for file in self._all:
                file.reopen()
            self._sync_folders()
        self._write(todo)

    def _sync_folders(self) -> None:
        """Up to HAFS_HOME: a new folder is a name, too."""
        for folder in (self.files.path, *self.files.path.parents[:2]):
            sync_folder(folder)

    def _begin_anew(self) -> None:
        """Make the folder again: there is nothing in it yet that could be lost."""
        self._lock.release()
        self._take_lock()
        self._check_spec()

    # --- opening and closing -----------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        if not self._lock.acquire():
            raise StoreHeld(
                f'campaign "{self.files.name}" is being written by process {holder(self.files.lock)}',
                hint=f"follow it with: hafs campaign logs {self.files.name} -f",
            )
        self._lock.sign()

    def _check_spec(self) -> None:
        new = self._spec.model_dump(mode="json")
        if self.files.spec.exists():
            old = read_spec(self.files).model_dump(mode="json")
            changed = [key for key in new if key not in FREE_TO_CHANGE and new[key] != old.get(key)]
            if changed:
                raise SpecChanged(
                    f'campaign "{self.files.name}" was started with another {", ".join(changed)}',
                    hint=f"give the new one a name of its own (--name, or name = …), or remove {self.files.path} to begin again",
                )
        write_atomic(self.files.spec, json.dumps({"spec": new, **self._record}, indent=1).encode())

    def _restore(self) -> None:
        """Know what earlier runs have done, and write the calls whose own line a crash has swallowed."""
        restored = restore(self.files.path)
        self.tally = restored.tally
        self._indexed = restored.tally.calls - restored.read
        while owed := list(islice(restored.owed, _MENDED_AT_ONCE)):
            calls = [call for one in owed if self._is_new(call := _call_of(one, self.files))]
            with translate_os_errors(self.files.calls):
                self._calls.append(b"".join(map(_line, calls)))
        self._ends = {file.path.name: file.end for file in self._all}
        if self.tally.calls - self._indexed >= INDEX_EVERY:
            self._save_index()

    def _is_new(self, call: Call) -> bool:
        """Count the call of a row, unless it has a line already: a person may have written a row twice."""
        cell = self.tally.cells.get((call.domain, call.cell))
        if cell is not None and call.number in cell.used:
            return False
        self._count(call)
        return True

    def _save_index(self) -> None:
        try:
            save(self.files.path, Snapshot(self.tally, self._ends))
        except OSError as error:
            log.warning("the index cannot be written, so the next start takes longer: %s", error)
        self._indexed = self.tally.calls  # where it failed it is tried again with the next ones

    def _close(self) -> None:
        for file in self._all:
            file.close()
        self._lock.release()


def read_spec(files: CampaignFiles) -> CampaignSpec:
    """The spec a campaign was last started with. Raises StoreCorrupt where campaign.json is none, or another version's."""
    try:
        return CampaignSpec.model_validate(json.loads(files.spec.read_text(encoding="utf-8"))["spec"])
    except (ValueError, KeyError, TypeError) as error:
        hint = f"start the campaign with its TOML file under another name, or move {files.path} away"
        raise StoreCorrupt(f"{files.spec}: not the spec of a campaign of this version", hint=hint) from error


def _may_pass(error: BaseException) -> bool:
    """Whether a write that failed may succeed later, without a new start."""
    cause = error.__cause__
    return isinstance(error, DiskFull) or (
        isinstance(error, StoreError) and isinstance(cause, OSError) and cause.errno in _MAY_PASS
    )


def _line(row: Tolerant) -> bytes:
    return row.model_dump_json().encode() + b"\n"


def _call_of(owed: Owed, files: CampaignFiles) -> Call:
    """The call of a row, from the row itself. Raises StoreCorrupt for a row that does not say how it was made."""
    row, accepted = owed.row, owed.verdict == "accepted"
    try:
        made = Provenance.model_validate(row["provenance"])
        return Call(
            task_id=row["id"],
            domain=row["domain"],
            cell=made.cell,
            number=made.number,
            verdict=owed.verdict,
            reason=row.get("reason", ""),
            answer=answer_id(row["source_id"], row["completion"]) if accepted else "",
            lane=made.lane,
            provider=made.provider,
            model=made.model,
            attempt=made.attempt,
            prompt_tokens=made.prompt_tokens,
            completion_tokens=made.completion_tokens,
            cost_usd=made.cost_usd,
            time=made.created_at,
        )
    except (KeyError, TypeError, ValidationError) as error:
        path = files.samples if accepted else files.rejected
        raise StoreCorrupt(
            f"{path}: the row {row.get('id', '?')} does not say how it was made", hint="mend or remove that line"
        ) from error
