"""The node's SQLite state. Only the daemon changes a job's state; rpc processes insert jobs and intents, and read.

Every change of a state is a legal transition, and one transaction together with its event. A job's id is never used again.
The same key never makes a second job, whoever asks, however many ask at once. Times are Unix seconds.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from config.contracts.base import Tolerant
from config.contracts.job import ENDED, STAGES, JobError, JobResult, JobState, JobView, TrainJob
from config.errors import DiskFull, JobFailed, JobNotFound, StoreCorrupt, StoreError
from config.locks import alone

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT UNIQUE,
    key TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    dataset_id TEXT NOT NULL,
    state TEXT NOT NULL,
    detail TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    error TEXT,
    result TEXT,
    checkpoint INTEGER NOT NULL DEFAULT 0, -- the newest step when an attempt was last interrupted
    stalls INTEGER NOT NULL DEFAULT 0,     -- interrupted attempts since that step grew
    due_at REAL NOT NULL DEFAULT 0         -- an interrupted job is queued again then
);
CREATE TABLE intents (seq INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, verb TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, at REAL NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL
);
CREATE INDEX jobs_state ON jobs(state);
"""
MAX_STALLS = 2
CANCEL = "cancel"


class Event(NamedTuple):
    seq: int
    job: str
    at: float
    state: JobState
    detail: str


class Queue:
    """One connection to <root>/state.sqlite; for one thread."""

    def __init__(self, root: Path) -> None:
        self.path = root / "state.sqlite"
        root.mkdir(parents=True, exist_ok=True)
        with self._translated():
            self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            try:
                self._db.execute("PRAGMA synchronous=FULL")
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        self._db.close()

    def submit(self, job: TrainJob, write: Callable[[str, TrainJob], None]) -> tuple[JobView, bool]:
        """The job of this key, and whether it is new. `write` puts down its folder before anyone can see it queued."""
        with self._transaction():
            known = self._db.execute("SELECT id FROM jobs WHERE key = ?", (job.key,)).fetchone()
            if known:
                return self.get(known["id"]), False
            now = time.time()
            row = (job.key, job.spec.kind, job.spec.name, job.dataset_id, JobState.QUEUED, now, now)
            fields = "key, kind, name, dataset_id, state, created_at, updated_at"
            seq = self._db.execute(f"INSERT INTO jobs ({fields}) VALUES (?, ?, ?, ?, ?, ?, ?)", row).lastrowid
            id_ = f"{job.spec.kind}-{seq:04d}-{job.key[:4]}"
            self._db.execute("UPDATE jobs SET id = ? WHERE seq = ?", (id_, seq))
            self._event(id_, JobState.QUEUED, "")
            write(id_, job)
            return self.get(id_), True

    def get(self, id_: str) -> JobView:
        """Raises JobNotFound."""
        row = self._one("SELECT * FROM jobs WHERE id = ?", id_)
        if row is None:
            raise JobNotFound(f'no job "{id_}" on this node', hint="hafs train status lists the jobs")
        return _view(row)

    def resolve(self, text: str) -> JobView:
        """The job meant by an id, by a model name (its newest job), or by the start of one id.

        Raises:
            JobNotFound: none, or the start of several ids.
        """
        exact = self._one("SELECT * FROM jobs WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC, seq DESC LIMIT 1", text)
        if exact is not None:
            return _view(exact)
        found = self._rows("SELECT * FROM jobs WHERE ?1 != '' AND substr(id, 1, length(?1)) = ?1 ORDER BY seq DESC", text)
        if len(found) == 1:
            return _view(found[0])
        if found:
            raise JobNotFound(
                f'"{text}" begins {len(found)} job ids', hint="type more of it: " + ", ".join(r["id"] for r in found[:5])
            )
        raise JobNotFound(f'no job "{text}" on this node', hint="hafs train status lists the jobs")

    def all(self) -> list[JobView]:
        """Every job, the newest first."""
        return [_view(row) for row in self._rows("SELECT * FROM jobs ORDER BY seq DESC")]

    def owed(self) -> list[JobView]:
        """What has not ended, the oldest first."""
        marks = ", ".join("?" * len(ENDED))
        return [_view(row) for row in self._rows(f"SELECT * FROM jobs WHERE state NOT IN ({marks}) ORDER BY seq", *ENDED)]

    def events(self, job: str, after: int = 0) -> list[Event]:
        rows = self._rows("SELECT * FROM events WHERE job = ? AND seq > ? ORDER BY seq", job, after)
        return [Event(row["seq"], row["job"], row["at"], JobState(row["state"]), row["detail"]) for row in rows]

    def intend_cancel(self, id_: str) -> None:
        """Ask the daemon to cancel. It forgets the wish when the job ends, for whatever reason."""
        with self._transaction():
            if not self.get(id_).state.ended:
                self._db.execute("INSERT INTO intents (job, verb, at) VALUES (?, ?, ?)", (id_, CANCEL, time.time()))

    def cancels(self) -> set[str]:
        return {row["job"] for row in self._rows("SELECT job FROM intents WHERE verb = ?", CANCEL)}

    def begin_attempt(self, id_: str) -> int:
        """QUEUED → PREPARING; the number of the attempt, from 1."""
        with self._transaction():
            self._db.execute("UPDATE jobs SET attempt = attempt + 1 WHERE id = ?", (id_,))
            job = self.get(id_)
            self._become(job, JobState.PREPARING, f"attempt {job.attempt}")
            return job.attempt

    def advance(self, id_: str, state: JobState, detail: str) -> None:
        """Follow a stage of the pipeline forward; a stage that is not ahead changes at most the detail."""
        with self._transaction():
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
        with self._transaction():
            job = self.get(id_)
            row = self._db.execute("SELECT checkpoint, stalls FROM jobs WHERE id = ?", (id_,)).fetchone()
            stalls = 0 if checkpoint > row["checkpoint"] else row["stalls"] + 1
            due = time.time() + backoff_s * (stalls + 1)
            self._db.execute(
                "UPDATE jobs SET checkpoint = ?, stalls = ?, due_at = ? WHERE id = ?", (checkpoint, stalls, due, id_)
            )
            self._become(job, JobState.INTERRUPTED, why)
            if stalls < MAX_STALLS:
                return JobState.INTERRUPTED
            self._end(self.get(id_), JobState.FAILED, error=_stalled(why, tail, error))
            return JobState.FAILED

    def requeue_due(self, now: float) -> None:
        """INTERRUPTED → QUEUED for those whose backoff is over."""
        with self._transaction():
            for row in self._rows("SELECT * FROM jobs WHERE state = ? AND due_at <= ?", JobState.INTERRUPTED, now):
                self._become(_view(row), JobState.QUEUED, f"continues: {row['detail']}")

    def end(self, id_: str, state: JobState, *, error: JobError | None = None, result: JobResult | None = None) -> None:
        """SUCCEEDED, FAILED or CANCELLED: it stays so. Success goes through REGISTERING, should its stage have been missed."""
        with self._transaction():
            job = self.get(id_)
            if state is JobState.SUCCEEDED and job.state.may_become(JobState.REGISTERING):
                self._become(job, JobState.REGISTERING, "")
                job = self.get(id_)
            self._end(job, state, error=error, result=result)

    def _end(self, job: JobView, state: JobState, *, error: JobError | None = None, result: JobResult | None = None) -> None:
        self._become(job, state, error.message if error else "")
        self._db.execute("UPDATE jobs SET error = ?, result = ? WHERE id = ?", (_json(error), _json(result), job.id))
        self._db.execute("DELETE FROM intents WHERE job = ?", (job.id,))

    def _become(self, job: JobView, state: JobState, detail: str) -> None:
        if not job.state.may_become(state):
            raise StoreError(
                f"job {job.id} cannot go from {job.state} to {state}", hint="this is a bug in hafs; please report it"
            )
        self._set(job.id, state, detail)

    def _set(self, id_: str, state: JobState, detail: str) -> None:
        self._db.execute("UPDATE jobs SET state = ?, detail = ?, updated_at = ? WHERE id = ?", (state, detail, time.time(), id_))
        self._event(id_, state, detail)

    def _event(self, id_: str, state: JobState, detail: str) -> None:
        self._db.execute("INSERT INTO events (job, at, state, detail) VALUES (?, ?, ?, ?)", (id_, time.time(), state, detail))

    def _one(self, sql: str, *values: object) -> sqlite3.Row | None:
        rows = self._rows(sql, *values)
        return rows[0] if rows else None

    def _rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._translated():
            return self._db.execute(sql, values).fetchall()

    def _prepare(self) -> None:
        """Make the tables, once. The switch to WAL ignores the busy timeout, so a lock of ours keeps the first openers apart."""
        if self._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
            return
        with alone(self.path.with_suffix(".lock")):
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreError(f"{self.path} was written by a newer hafs", hint="upgrade hafs on this node")
            if version == 0:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_FULL:
                raise DiskFull(f"no space left for {self.path}", hint="free some space on the node and try again") from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                hint = "move it away (jobs/ and models/ stay) and submit again"
                raise StoreCorrupt(f"{self.path} is damaged: {error}", hint=hint) from error
            raise StoreError(f"{self.path}: {error}", hint="check that the folder is yours and on a local disk") from error


def _stalled(why: str, tail: str, error: JobError | None) -> JobError:
    if error is not None:
        hint = f"{error.hint}\n{MAX_STALLS} attempts in a row came no further; once that is mended, submit it again"
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
        error=None if row["error"] is None else JobError.model_validate_json(row["error"]),
        result=None if row["result"] is None else JobResult.model_validate_json(row["result"]),
    )
