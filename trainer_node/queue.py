"""The node's jobs. Only the daemon moves a job on; rpc processes queue one (anew or again), note intents, and read.

Every change of a state is a legal transition, and one transaction together with its event and its lease: a job at work holds
exactly one lease, any other job none, and no device has two. A lease's fence is greater than all before it, so what was started
under an older one can tell that it has been given up. A job's id is never used again. The same key never makes a second job,
whoever asks, however many ask at once. Times are Unix seconds.
"""

import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from config.contracts.base import Tolerant
from config.contracts.job import ENDED, STAGES, JobError, JobResult, JobState, JobView, TrainJob
from config.contracts.wire import JobEvent
from config.errors import JobFailed, JobNotFound, StoreError
from trainer_node.database import Database

MAX_STALLS = 2
CANCEL = "cancel"
JITTER = 0.25  # share of a backoff; jobs that one cause cut off do not all come back at the same moment
EVENTS_MAX = 1000


class Lease(NamedTuple):
    device: str
    job: str
    fence: int


class Queue:
    """One connection to <root>/state.sqlite; for one thread."""

    def __init__(self, root: Path) -> None:
        self._db = Database(root / "state.sqlite")

    def close(self) -> None:
        self._db.close()

    def submit(self, job: TrainJob, write: Callable[[str, TrainJob], None]) -> tuple[JobView, bool]:
        """The job of this key, and whether it is new. `write` puts down its folder before anyone can see it queued.

        Raises:
            JobNotFound: the job that it is to wait for.
        """
        with self._db.transaction("submit"):
            known = self._db.row("SELECT id FROM jobs WHERE key = ?", job.key)
            if known:
                return self.get(known["id"]), False
            after = self.resolve(job.after).id if job.after else ""
            now = time.time()
            fields = "key, kind, name, dataset_id, state, created_at, updated_at, priority, after"
            row = (job.key, job.spec.kind, job.spec.name, job.dataset_id, JobState.QUEUED, now, now, job.priority, after)
            seq = self._db.write(f"INSERT INTO jobs ({fields}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", *row)
            id_ = f"{job.spec.kind}-{seq:04d}-{job.key[:4]}"
            self._db.write("UPDATE jobs SET id = ? WHERE seq = ?", id_, seq)
            self._set(id_, JobState.QUEUED, f"after {after}" if after else "")
            write(id_, job)
            return self.get(id_), True

    def retry(self, id_: str) -> JobView:
        """FAILED or CANCELLED → QUEUED: it goes on from its last whole checkpoint, and repeats no stage that is done.

        Any other job is left as it is, so asking twice is harmless, even where it succeeds before the second request arrives.
        """
        with self._db.transaction("retry"):
            job = self.get(id_)
            if job.state.ended and job.state is not JobState.SUCCEEDED:
                self._set(id_, JobState.QUEUED, "tried again")
                self._db.write("UPDATE jobs SET stalls = 0, error = NULL WHERE id = ?", id_)
            return self.get(id_)

    def get(self, id_: str) -> JobView:
        """Raises JobNotFound."""
        row = self._db.row("SELECT * FROM jobs WHERE id = ?", id_)
        if row is None:
            raise JobNotFound(f'no job "{id_}" on this node', hint="hafs train status lists the jobs")
        return _view(row)

    def resolve(self, text: str) -> JobView:
        """The job meant by an id, by a model name (its newest job), or by the start of one id.

        Raises:
            JobNotFound: none, or the start of several ids.
        """
        exact = self._db.row("SELECT * FROM jobs WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC, seq DESC LIMIT 1", text)
        if exact is not None:
            return _view(exact)
        found = self._db.rows("SELECT * FROM jobs WHERE ?1 != '' AND substr(id, 1, length(?1)) = ?1 ORDER BY seq DESC", text)
        if len(found) == 1:
            return _view(found[0])
        if found:
            raise JobNotFound(
                f'"{text}" begins {len(found)} job ids', hint="type more of it: " + ", ".join(r["id"] for r in found[:5])
            )
        raise JobNotFound(f'no job "{text}" on this node', hint="hafs train status lists the jobs")

    def all(self) -> list[JobView]:
        """Every job, the newest first."""
        return [_view(row) for row in self._db.rows("SELECT * FROM jobs ORDER BY seq DESC")]

    def owed(self) -> list[JobView]:
        """What has not ended, in the order in which it is its turn: by priority, then the oldest first."""
        marks = ", ".join("?" * len(ENDED))
        found = self._db.rows(f"SELECT * FROM jobs WHERE state NOT IN ({marks}) ORDER BY priority DESC, seq", *ENDED)
        return [_view(row) for row in found]

    def events(self, job: str = "", after: int = 0) -> list[JobEvent]:
        """The next events of one job, or of all, at most EVENTS_MAX."""
        found = self._db.rows(
            "SELECT * FROM events WHERE seq > ?1 AND (?2 = '' OR job = ?2) ORDER BY seq LIMIT ?3", after, job, EVENTS_MAX
        )
        return [
            JobEvent(seq=row["seq"], job=row["job"], at=row["at"], state=JobState(row["state"]), detail=row["detail"])
            for row in found
        ]

    def leases(self) -> list[Lease]:
        """What is leased now."""
        return [Lease(row["device"], row["job"], row["fence"]) for row in self._db.rows("SELECT * FROM leases WHERE job != ''")]

    def lease(self, id_: str) -> Lease | None:
        """The lease of a job at work."""
        return next((lease for lease in self.leases() if lease.job == id_), None)

    def intend_cancel(self, id_: str) -> None:
        """Ask the daemon to cancel. It forgets the wish when the job ends, for whatever reason."""
        with self._db.transaction("cancel"):
            if not self.get(id_).state.ended:
                self._db.write("INSERT INTO intents (job, verb, at) VALUES (?, ?, ?)", id_, CANCEL, time.time())

    def cancels(self) -> set[str]:
        return {row["job"] for row in self._db.rows("SELECT job FROM intents WHERE verb = ?", CANCEL)}

    def begin_attempt(self, id_: str, device: str = "cpu") -> int:
        """QUEUED → PREPARING, with a lease of the device; the number of the attempt, from 1.

        Raises:
            StoreError: the device is leased.
        """
        with self._db.transaction("attempt"):
            self._db.write("UPDATE jobs SET attempt = attempt + 1 WHERE id = ?", id_)
            job = self.get(id_)
            self._become(job, JobState.PREPARING, f"attempt {job.attempt} on {device}")
            self._grant(device, id_)
            return job.attempt

    def advance(self, id_: str, state: JobState, detail: str) -> None:
        """Follow a stage of the pipeline forward; a stage that is not ahead changes at most the detail."""
        with self._db.transaction("advance"):
            job = self.get(id_)
            if state in STAGES and job.state.may_become(state):
                self._become(job, state, detail)
            elif state is job.state and detail != job.detail:
                self._set(id_, state, detail)

    def interrupt(
        self, id_: str, *, checkpoint: int, why: str, backoff_s: float, tail: str = "", error: JobError | None = None
    ) -> JobState:
        """An attempt was cut off: INTERRUPTED until the backoff is over, or FAILED after two in a row without a new checkpoint.

        `checkpoint` is the newest whole step, 0 for none; a failure is told as `error`, if the attempt left one, and else with
        `tail`, the last lines of the log.
        """
        with self._db.transaction("interrupt"):
            job = self.get(id_)
            row = self._db.rows("SELECT checkpoint, stalls FROM jobs WHERE id = ?", id_)[0]
            stalls = 0 if checkpoint > row["checkpoint"] else row["stalls"] + 1
            due = time.time() + backoff_s * (stalls + 1) * random.uniform(1 - JITTER, 1 + JITTER)
            self._db.write("UPDATE jobs SET checkpoint = ?, stalls = ?, due_at = ? WHERE id = ?", checkpoint, stalls, due, id_)
            self._become(job, JobState.INTERRUPTED, why)
            if stalls < MAX_STALLS:
                return JobState.INTERRUPTED
            self._end(self.get(id_), JobState.FAILED, error=_stalled(why, tail, error))
            return JobState.FAILED

    def requeue_due(self, now: float) -> None:
        """INTERRUPTED → QUEUED for those whose backoff is over."""
        with self._db.transaction("requeue"):
            for row in self._db.rows("SELECT * FROM jobs WHERE state = ? AND due_at <= ?", JobState.INTERRUPTED, now):
                self._become(_view(row), JobState.QUEUED, f"continues: {row['detail']}")

    def end(self, id_: str, state: JobState, *, error: JobError | None = None, result: JobResult | None = None) -> None:
        """SUCCEEDED, FAILED or CANCELLED: it stays so. Success goes through REGISTERING, should its stage have been missed."""
        with self._db.transaction("end"):
            job = self.get(id_)
            if state is JobState.SUCCEEDED and job.state.may_become(JobState.REGISTERING):
                self._become(job, JobState.REGISTERING, "")
                job = self.get(id_)
            self._end(job, state, error=error, result=result)

    def _end(self, job: JobView, state: JobState, *, error: JobError | None = None, result: JobResult | None = None) -> None:
        self._become(job, state, error.message if error else "")
        self._db.write("UPDATE jobs SET error = ?, result = ? WHERE id = ?", _json(error), _json(result), job.id)
        self._db.write("DELETE FROM intents WHERE job = ?", job.id)

    def _become(self, job: JobView, state: JobState, detail: str) -> None:
        if not job.state.may_become(state):
            raise StoreError(
                f"job {job.id} cannot go from {job.state} to {state}", hint="this is a bug in hafs; please report it"
            )
        if not state.active:
            self._db.write("UPDATE leases SET job = '' WHERE job = ?", job.id)
        self._set(job.id, state, detail)

    def _grant(self, device: str, id_: str) -> None:
        if any(lease.device == device for lease in self.leases()):
            raise StoreError(f"{device} is leased to another job", hint="this is a bug in hafs; please report it")
        self._db.write(
            "INSERT INTO leases SELECT ?1, ?2, coalesce(max(fence), 0) + 1 FROM leases WHERE true"
            " ON CONFLICT(device) DO UPDATE SET job = excluded.job, fence = excluded.fence",
            device,
            id_,
        )

    def _set(self, id_: str, state: JobState, detail: str) -> None:
        now = time.time()
        self._db.write("UPDATE jobs SET state = ?, detail = ?, updated_at = ? WHERE id = ?", state, detail, now, id_)
        self._db.write("INSERT INTO events (job, at, state, detail) VALUES (?, ?, ?, ?)", id_, now, state, detail)


def _stalled(why: str, tail: str, error: JobError | None) -> JobError:
    if error is not None:
        hint = f"{error.hint}\n{MAX_STALLS} attempts in a row came no further; once that is mended: hafs train retry"
        return error.model_copy(update={"hint": hint.lstrip()})
    message = f"{MAX_STALLS} attempts in a row came to no new checkpoint; the last one: {why}"
    hint = "see hafs train logs; killed for memory? a smaller batch or max_length helps; a smaller save_steps loses less"
    return JobError(code=JobFailed.__name__, message=message, hint=f"{hint}\n{tail}")


def _json(model: Tolerant | None) -> str | None:
    return None if model is None else model.model_dump_json()


def _view(row: sqlite3.Row) -> JobView:
    return JobView(
        id=row["id"],
        kind=row["kind"],
        name=row["name"],
        state=JobState(row["state"]),
        detail=row["detail"],
        attempt=row["attempt"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        dataset_id=row["dataset_id"],
        priority=row["priority"],
        after=row["after"],
        error=None if row["error"] is None else JobError.model_validate_json(row["error"]),
        result=None if row["result"] is None else JobResult.model_validate_json(row["result"]),
    )
