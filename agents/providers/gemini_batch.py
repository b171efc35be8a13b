"""Gemini by the batch: half the price, hours of latency, the same Provider.

- Nothing is paid twice: a request that is in a batch of the journal, alive or ended, waits for it or is handed its answer, and is
  not sent again. A crash or a cancelled call leaves it there for the next start.
- An answer stays in the journal until it is said to be `stored`.
- No task runs in the background: of the calls that wait for a batch, one drives it.
"""

import copy
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from agents.providers.batch import Batch, LateBill, Pace
from agents.providers.batch_journal import BatchJournal, BatchRecord, Json
from agents.providers.gemini_jobs import BatchJobs
from agents.task import Completion, Sampling
from config.contracts.base import content_id
from config.contracts.sample import Message
from config.errors import ProviderError

__all__ = ["BatchProvider", "LateBill"]

log = logging.getLogger("hafs.campaign")


class BatchProvider:
    """One lane's batches; it may serve several models, each with batches of its own.

    Args:
        jobs: the server.
        journal: a folder of this lane alone; who opens it holds the campaign's lock.
        patience_s: a batch that is older is abandoned.
        most: requests in a batch.
        gather_s: a batch is sent when no request has joined it for so long.
        settle_s: how long the server's list may lag behind what was created.
        poll_s: the first and the longest wait between two looks at a job.
        clock: Unix seconds.

    Raises:
        StoreCorrupt: the journal cannot be read.
    """

    name = "gemini"

    def __init__(
        self,
        jobs: BatchJobs,
        journal: Path,
        *,
        patience_s: float,
        most: int = 1000,
        gather_s: float = 5.0,
        settle_s: float = 30.0,
        poll_s: tuple[float, float] = (5.0, 60.0),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._journal = BatchJournal(journal)
        self._pace = Pace(patience_s, settle_s, poll_s, clock)
        self._most = most
        self._gather_s = gather_s
        self._gathering: dict[str, Batch] = {}  # by model
        self._batches = {record.display_name: self._batch(record) for record in self._journal.load()}
        self._by_request = {key: batch for batch in self._batches.values() for key in batch.wanted}

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """The answer of a batch, hours later. Raises what a Provider raises: a whole batch's error, for each of its requests.

        Cancelled, a request stays where it is; only one that was not sent yet is taken back.
        """
        started = time.perf_counter()
        key = _request_id(model, messages, sampling)
        batch = self._by_request.get(key) or self._join(key, model, self._jobs.request(model, messages, sampling))
        try:
            async with batch.lock:
                if not batch.over:
                    await batch.drive(self._gather_s)
                    self._tidy(batch)
        except BaseException:
            if batch.gathering:
                self._by_request.pop(key, None)
                batch.leave(key)
            raise
        if batch.failure is not None:
            raise copy.copy(batch.failure) from batch.failure  # up to `most` callers raise it: each one of its own
        try:
            return self._jobs.completion(batch.take(key), model, sampling, time.perf_counter() - started)
        except ProviderError:
            self._forget(batch, key)  # asked for again, it is sent again
            raise

    def stored(self, model: str, messages: Sequence[Message], sampling: Sampling) -> None:
        """An answer that was handed out is safe elsewhere: the journal need not keep it."""
        key = _request_id(model, messages, sampling)
        batch = self._by_request.get(key)
        if batch is not None and batch.answers is not None:
            self._forget(batch, key)

    async def late_bills(self) -> list[LateBill]:
        """What abandoned batches have cost after all, as far as it is known now and was not said to be `billed`.

        Ask when no task runs any more: until then a late answer may still be asked for, and is handed out as any other.
        """
        bills = []
        for batch in [batch for batch in self._batches.values() if batch.record.abandoned]:
            try:
                async with batch.lock:
                    bill = await batch.late_bill()
            except ProviderError as error:
                log.warning("batch %s: %s", batch.name, error)
            else:
                bills += [bill] if bill else []
            self._tidy(batch)
        return bills

    async def billed(self, bill: LateBill) -> None:
        """A late bill is written down: it is not reported again."""
        batch = self._batches[bill.display_name]
        batch.wanted.clear()
        self._tidy(batch)

    def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        """Online, at the full price: a batch has no pieces."""
        return self._jobs.stream(model, messages, sampling)

    async def models(self) -> list[str]:
        return await self._jobs.models()

    async def aclose(self) -> None:
        """The batches go on without us. What was stored of an ended one is no longer in the journal's record of it."""
        for batch in self._batches.values():
            if batch.record.ended and len(batch.wanted) < len(batch.record.requests):
                wanted = [key for key in batch.record.requests if key in batch.wanted]
                self._journal.write(batch.record.model_copy(update={"requests": wanted}))
        await self._jobs.aclose()

    def _join(self, key: str, model: str, request: Json) -> Batch:
        batch = self._gathering.get(model)
        if batch is None or not batch.gathering:
            name = f"hafs-{uuid.uuid4().hex}"
            batch = self._batch(BatchRecord(display_name=name, model=model, created_at=0.0, requests=[]), gathering=True)
            self._gathering[model] = self._batches[name] = batch
        batch.join(key, request, self._most)
        self._by_request[key] = batch
        return batch

    def _batch(self, record: BatchRecord, *, gathering: bool = False) -> Batch:
        return Batch(record, self._jobs, self._journal, self._pace, gathering=gathering)

    def _forget(self, batch: Batch, key: str) -> None:
        batch.wanted.discard(key)
        if self._by_request.get(key) is batch:
            del self._by_request[key]
        if not batch.wanted:
            self._drop(batch)

    def _tidy(self, batch: Batch) -> None:
        """Follow what a batch has learnt: requests that it no longer answers may be sent again."""
        for key in [key for key, holder in self._by_request.items() if holder is batch and key not in batch.wanted]:
            del self._by_request[key]
        if not batch.wanted:
            self._drop(batch)

    def _drop(self, batch: Batch) -> None:
        self._batches.pop(batch.name, None)
        self._journal.drop(batch.name)


def _request_id(model: str, messages: Sequence[Message], sampling: Sampling) -> str:
    return content_id([model, [message.model_dump() for message in messages], sampling.named])
