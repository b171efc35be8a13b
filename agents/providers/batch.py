"""One batch, from the requests that are gathered to the answers that are handed out.

- It is created at most once. Where nobody knows whether it was, the server's list is asked for its display name, twice, first.
- Whoever holds its lock drives it. Who is cancelled on the way leaves all to the next who waits, or to the next start.
- Only what was answered was paid for. The rest is not wanted any more: asked for again, it goes into another batch.
- One that stalls is abandoned: its requests fail as not billed, so that they go elsewhere, and it may be billed late.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import anyio
from anyio import to_thread

from agents.providers.batch_journal import BatchJournal, BatchRecord, Json, parse_answers
from agents.providers.gemini_jobs import BatchJobs, Job, usage
from agents.task import Usage
from config.errors import AuthFailed, BadRequest, ProviderError, ProviderUnavailable, RateLimited

log = logging.getLogger("hafs.campaign")


@dataclass(frozen=True)
class LateBill:
    """An abandoned batch that was answered after all: `requests` answers that nobody waited for, and what they used."""

    display_name: str
    model: str
    requests: int
    usage: Usage


@dataclass(frozen=True)
class Pace:
    """Seconds: until a batch is abandoned, that the server's list may lag, the first and the longest wait between two looks.

    `clock` tells Unix seconds: a laptop that sleeps uses up patience.
    """

    patience_s: float
    settle_s: float
    poll_s: tuple[float, float]
    clock: Callable[[], float]

    def waits(self) -> Iterator[float]:
        wait_s, longest_s = self.poll_s
        while True:
            yield wait_s
            wait_s = min(2 * wait_s, longest_s)


class Batch:
    """A batch is over when it has answers or a failure. `wanted` are the requests whose answers are not stored elsewhere yet."""

    def __init__(
        self, record: BatchRecord, jobs: BatchJobs, journal: BatchJournal, pace: Pace, *, gathering: bool = False
    ) -> None:
        self.record = record
        self.wanted = set(record.requests)
        self.gathering = gathering
        self.answers: dict[str, Json] | None = None
        self.failure: ProviderError | None = None
        self.lock = anyio.Lock()
        self._jobs = jobs
        self._journal = journal
        self._pace = pace
        self._requests: dict[str, Json] = {}  # by id, until a job has them
        self._joined = anyio.Event()
        self._intended = not gathering  # the journal has it
        self._doubtful = not gathering and not record.job  # a job may be on the server although the record names none
        self._taken: set[str] = set()

    @property
    def name(self) -> str:
        return self.record.display_name

    @property
    def over(self) -> bool:
        return self.answers is not None or self.failure is not None

    # --- gathering ---------------------------------------------------------------------------------------------------

    def join(self, key: str, request: Json, most: int) -> None:
        """Add a request; the one that makes it full closes the batch."""
        self._requests[key] = request
        self.wanted.add(key)
        if len(self._requests) >= most:
            self._close()
        self._joined.set()

    def leave(self, key: str) -> None:
        """Take back a request that is not sent yet."""
        self._requests.pop(key, None)
        self.wanted.discard(key)

    async def _gather(self, quiet_s: float) -> None:
        while self.gathering:
            self._joined = anyio.Event()
            with anyio.move_on_after(quiet_s) as quiet:
                await self._joined.wait()
            if quiet.cancelled_caught and self.gathering:
                self._close()

    def _close(self) -> None:
        """Nobody joins any more: from here on the requests belong together."""
        self.gathering = False
        changes = {"requests": list(self._requests), "created_at": self._pace.clock()}
        self.record = self.record.model_copy(update=changes)

    # --- the way to the answers --------------------------------------------------------------------------------------

    async def drive(self, gather_s: float) -> None:
        """Bring the batch to its end: afterwards it is over. Its lock is held.

        Raises:
            StoreError: the journal cannot be written.
        """
        await self._gather(gather_s)
        if not self._intended:
            await to_thread.run_sync(self._journal.intend, self.record, self._requests)
            self._intended = True
            self._requests = {}
        try:
            if not self.record.job:
                await self._submit()
            await self._follow()
        except ProviderError as error:
            self.failure = error
            if not self.record.job and not self._doubtful:
                self.wanted.clear()  # it was never created

    async def _submit(self) -> None:
        """Have exactly one job of this name on the server. Raises what certainly created none; doubt is cleared up by looking."""
        for wait_s in self._pace.waits():
            try:
                job = await self._find() or await self._create()
            except (ProviderUnavailable, RateLimited) as error:
                if not self._doubtful:
                    raise
                log.warning("batch %s: whether it was created is not known yet: %s", self.name, error)
                await self._wait(wait_s)
            else:
                self._doubtful = False
                return await self._write(job=job)

    async def _find(self) -> str:
        """The job's name, if it may be there and is; a negative answer ends the doubt."""
        if not self._doubtful:
            return ""
        job = await self._jobs.find(self.name)
        if not job:
            await anyio.sleep(self._pace.settle_s)
            job = await self._jobs.find(self.name)
        if not job:
            self._doubtful = False
            if self.record.abandoned:
                self.wanted.clear()
                raise ProviderUnavailable(f"batch {self.name} was given up before it was created", billable=False)
            await self._write(created_at=self._pace.clock())  # its patience begins now
        return job

    async def _create(self) -> str:
        file = await self._jobs.upload(self._journal.requests(self.name))  # no job can come of that alone
        self._doubtful = True
        try:
            return await self._jobs.create(self.record.model, file, self.name)
        except (RateLimited, AuthFailed, BadRequest):
            self._doubtful = False
            raise

    async def _follow(self) -> None:
        for wait_s in self._pace.waits():
            try:
                if await self._look():
                    return
            except (ProviderUnavailable, RateLimited) as error:
                log.warning("batch %s: %s; it is looked at again", self.name, error)
            await self._wait(wait_s)

    async def _look(self) -> bool:
        """True: the job has ended, and what it answered is in the journal and in memory."""
        if self.record.ended:
            self.answers = parse_answers(await to_thread.run_sync(self._journal.answers, self.name))
            return True
        try:
            job = await self._jobs.look(self.record.job)
            if not job.ended:
                return False
            lines = await self._jobs.fetch(job.file) if job.file else b""
        except BadRequest as error:
            log.warning("batch %s is gone from the server: %s", self.name, error)
            job, lines = Job("gone", ended=True), b""
        await self._end(job.state, lines)
        return True

    async def _end(self, state: str, lines: bytes) -> None:
        answers = parse_answers(lines)
        paid = [key for key in self.record.requests if "response" in answers.get(key, {})]
        log.info("batch %s ended as %s: %d of %d answered", self.name, state, len(paid), len(self.record.requests))
        record = self.record.model_copy(update={"requests": paid, "ended": state})
        if paid:
            await to_thread.run_sync(self._journal.end, record, lines)
        self.record, self.answers, self.failure = record, answers, None
        self.wanted = set(paid)

    async def _wait(self, wait_s: float) -> None:
        """Wait before the next look. Raises ProviderUnavailable, not billable, once the batch has stalled."""
        left_s = self.record.created_at + self._pace.patience_s - self._pace.clock()
        if left_s > 0:
            return await anyio.sleep(min(wait_s, left_s))
        if not self.record.abandoned:
            log.warning("batch %s stalled: its %d requests go elsewhere", self.name, len(self.record.requests))
            await self._cancel()
            await self._write(abandoned=True)
        raise ProviderUnavailable(
            f"batch {self.name} was not answered within {self._pace.patience_s / 3600:.3g} h",
            billable=False,
            hint='give the domain a lane without mode = "batch" to fall back to, or raise batch_patience',
        )

    async def _cancel(self) -> None:
        try:
            if self.record.job:
                await self._jobs.cancel(self.record.job)
        except ProviderError as error:
            log.warning("batch %s could not be cancelled: %s", self.name, error)

    async def _write(self, **changes: object) -> None:
        # In memory first: where the wait for the disk is cancelled, the write itself is not.
        self.record = self.record.model_copy(update=changes)
        await to_thread.run_sync(self._journal.write, self.record)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def take(self, key: str) -> Json:
        """The line that answers a request.

        Raises:
            ProviderUnavailable: there is none.
        """
        line = (self.answers or {}).get(key)
        if line is None:
            raise ProviderUnavailable(f"batch {self.name} ended as {self.record.ended} without this answer", billable=False)
        self._taken.add(key)
        return line

    async def late_bill(self) -> LateBill | None:
        """Look once more at an abandoned batch: what it used for the answers that nobody took. Its lock is held.

        Raises:
            ProviderError: the server does not say.
        """
        if self.answers is None:
            if not self.record.job:
                job = await self._find()
                await self._write(job=job)
            await self._look()
        used = [usage((self.answers or {})[key]) for key in self.wanted - self._taken] if self.answers else []
        if not used:
            return None
        total = Usage(*(sum(column) for column in zip(*map(astuple, used), strict=True)))
        return LateBill(self.name, self.record.model, len(used), total)
