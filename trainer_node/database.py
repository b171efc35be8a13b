"""<root>/state.sqlite: its tables, and transactions that are on the disk when they end.

A file of an older version is brought up to date by the first who opens it; one of a newer version is left alone.
A reader never waits for a writer (WAL); writers wait for each other for up to ten seconds.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from config.errors import DiskFull, StoreCorrupt, StoreError
from config.faults import around
from config.locks import alone

VERSIONS = (
    """
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
""",
    """
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN after TEXT NOT NULL DEFAULT ''; -- the id of the job that has to succeed first
CREATE TABLE leases (
    device TEXT PRIMARY KEY,
    job TEXT NOT NULL,      -- empty: free
    fence INTEGER NOT NULL  -- grows with every lease of any device
);
INSERT INTO leases SELECT 'unknown', id, 0 FROM jobs
    WHERE state IN ('PREPARING', 'RUNNING', 'EVALUATING', 'EXPORTING', 'REGISTERING') LIMIT 1; -- it was one at a time
CREATE INDEX events_job ON events(job);
""",
)


def is_older(path: Path) -> bool:
    """Whether opening the file would bring it up to date, after which the hafs that wrote it could not use it any more."""
    if not path.exists():
        return False
    with _translated(path), closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
        return _version(connection) < len(VERSIONS)


class Database:
    """One connection, for one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _translated(self.path):
            self._connection = sqlite3.connect(path, timeout=10, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            try:
                self._connection.execute("PRAGMA synchronous=FULL")
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        self._connection.close()

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """What a query finds. Raises StoreError, StoreCorrupt."""
        with _translated(self.path):
            return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        found = self.rows(sql, *values)
        return found[0] if found else None

    def write(self, sql: str, *values: object) -> int:
        """Change something; the number of the row that an INSERT made, else 0. Raises DiskFull, StoreError, StoreCorrupt."""
        with _translated(self.path):
            return self._connection.execute(sql, values).lastrowid or 0

    @contextmanager
    def transaction(self, name: str) -> Iterator[None]:
        """All or nothing, and alone; `name` is that of its fault points. Raises as `write` does."""
        with _translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                with around(f"commit.{name}"):
                    self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _prepare(self) -> None:
        """Make the tables, once. The switch to WAL ignores the busy timeout, so a lock of ours keeps the first openers apart."""
        if _version(self._connection) == len(VERSIONS):
            return
        with alone(self.path.with_suffix(".lock")):
            version = _version(self._connection)
            if version > len(VERSIONS):
                raise StoreError(f"{self.path} was written by a newer hafs", hint="upgrade hafs on this node")
            if version == 0:
                self._connection.execute("PRAGMA journal_mode=WAL")
            for number, script in enumerate(VERSIONS[version:], version + 1):
                with around("commit.tables"):
                    self._connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version={number}; COMMIT;")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL:
            raise DiskFull(f"no space left for {path}", hint="free some space on the node and try again") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            hint = "move it away (jobs/ and models/ stay) and submit again"
            raise StoreCorrupt(f"{path} is damaged: {error}", hint=hint) from error
        raise StoreError(f"{path}: {error}", hint="check that the folder is yours and on a local disk") from error
