"""One campaign, from its spec to its files. Whatever happens, rerunning it continues: the files say what is still owed."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import anyio

from agents.budget import Budget
from agents.lanes import Lane
from agents.scheduler import Scheduler
from agents.task import Outcome
from campaigns.domains.base import Domain, SourceItem
from campaigns.domains.registry import domain
from campaigns.interrupt import on_interrupt
from campaigns.lanes import open_lanes
from campaigns.plan import Cell, Plan
from campaigns.spec import CampaignSpec, source_files
from campaigns.status import CampaignEnd, Progress
from campaigns.store import Call, CampaignFiles, Rejected, Store, read_rows
from config.contracts.base import content_id
from config.contracts.sample import Provenance, Sample
from config.errors import translate_os_errors
from config.settings import Settings

log = logging.getLogger("hafs.campaign")


class Campaign:
    """A campaign being run. `progress` may be read at any time; `drain` lets what is in flight finish."""

    def __init__(self, settings: Settings, spec: CampaignSpec, spec_folder: Path, lanes: Mapping[str, Lane]) -> None:
        self.files = CampaignFiles(settings, spec.name)
        self.spec = spec
        self._domains: list[Domain] = [domain(name) for name in spec.domains]
        sources = {name: source_files(spec, name, spec_folder) for name in spec.domains}
        self.plan = Plan(spec, self._domains, sources)
        self.progress = Progress(spec)
        self._lanes = lanes
        self._scheduler: Scheduler | None = None
        self._store = Store(self.files, spec, version("hafs"))
        self._seen: set[str] = set()  # ids of (question, answer): the same sample twice teaches nothing

    def drain(self) -> None:
        if self._scheduler:
            self._scheduler.drain()

    async def run(self, on_progress: Callable[[Progress], None]) -> CampaignEnd:
        """Raises ProviderError where no lane works, StoreError (DiskFull, StoreHeld, …) where the files cannot be written."""
        with self._store as store:
            for call in store.calls():
                self.plan.restore(call)
                self.progress.count(call)
            self._seen = {content_id([row.source_id, row.completion]) for row in read_rows(self.files.samples, Sample)}
            before = self.plan.accepted
            budget = Budget(self.spec.budget.max_usd, spent_usd=self.progress.cost_usd)
            self._scheduler = Scheduler(list(self._lanes.values()), self.spec.routing, budget)
            log.info("start target=%d accepted=%d calls=%d", self.spec.target, before, self.progress.calls)
            self.progress.started()

            async def on_outcome(outcome: Outcome) -> None:
                call = await self._record(store, outcome)
                self.progress.count(call)
                on_progress(self.progress)

            end = await self._scheduler.run(self.plan, on_outcome)
        reason = "exhausted" if end.reason == "done" and self.plan.accepted < self.spec.target else end.reason
        message = end.message or f"{self.plan.accepted} of {self.spec.target} samples"
        log.info(
            "end reason=%s accepted=%d calls=%d cost_usd=%.4f", reason, self.plan.accepted, self.progress.calls, budget.spent_usd
        )
        return CampaignEnd(reason, message, self.plan.accepted, self.plan.accepted - before, budget.spent_usd)

    async def _record(self, store: Store, outcome: Outcome) -> Call:
        """Check one outcome, write it, and only then tell the plan: what is on the disk is what counts."""
        cell, number, item = self.plan.item(outcome.task)
        row, verdict, reason = self._judge(outcome, cell, number, item)
        completion = outcome.completion
        call = Call(
            task_id=outcome.task.id,
            domain=outcome.task.domain,
            cell=cell.name,
            number=number,
            verdict=verdict,
            reason=reason,
            lane=outcome.lane,
            model=completion.model if completion else "",
            attempt=outcome.attempt,
            prompt_tokens=completion.usage.prompt_tokens if completion else 0,
            completion_tokens=completion.usage.completion_tokens if completion else 0,
            cost_usd=outcome.cost_usd,
            cost_assumed=outcome.cost_assumed,
            latency_s=completion.latency_s if completion else 0.0,
            time=time.time(),
        )
        await store.append(call, row)
        self.plan.ended(outcome, verdict == "accepted")
        level = logging.WARNING if verdict == "failed" else logging.INFO
        log.log(level, "%s domain=%s cell=%s lane=%s reason=%s", verdict, call.domain, call.cell, call.lane, reason or "-")
        return call

    def _judge(self, outcome: Outcome, cell: Cell, number: int, item: SourceItem) -> tuple[Sample | Rejected | None, str, str]:
        """The row to keep, the verdict and its reason."""
        completion = outcome.completion
        if completion is None:
            return None, "failed", outcome.error
        made = _provenance(self.spec.name, outcome, cell, number)
        text = completion.text.strip()
        if completion.finish_reason != "stop":
            reason, proof = f"finish_{completion.finish_reason}", {}
        else:
            verdict = cell.domain.verify(item, text)
            reason, proof = ("" if verdict.accepted else verdict.reason or "rejected"), verdict.proof
        question = cell.domain.question(item)
        same = content_id([item.id, text])
        if not reason and same in self._seen:
            reason = "duplicate"
        if reason:
            rejected = Rejected(
                id=outcome.task.id,
                domain=cell.domain.name,
                source_id=item.id,
                reason=reason,
                messages=question,
                completion=completion.text,
                proof=proof,
                provenance=made,
            )
            return rejected, "rejected", reason
        self._seen.add(same)
        sample = Sample(
            id=outcome.task.id,
            domain=cell.domain.name,
            source_id=item.id,
            messages=question,
            completion=text,
            proof=proof,
            provenance=made,
        )
        return sample, "accepted", ""


def _provenance(campaign: str, outcome: Outcome, cell: Cell, number: int) -> Provenance:
    completion = outcome.completion
    assert completion is not None
    return Provenance(
        campaign=campaign,
        task_id=outcome.task.id,
        cell=cell.name,
        number=number,
        provider=outcome.provider,
        model=completion.model,
        lane=outcome.lane,
        attempt=outcome.attempt,
        prompt_sha256=content_id([message.model_dump() for message in outcome.task.messages]),
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        cost_usd=outcome.cost_usd,
        created_at=time.time(),
    )


async def run_campaign(
    settings: Settings, spec: CampaignSpec, folder: Path, on_progress: Callable[[Progress], None], on_drain: Callable[[], None]
) -> CampaignEnd:
    """Open the lanes, run the campaign in this process, write its log. `folder` is where relative sources start.

    Ctrl-C calls `on_drain` and lets what runs finish; again, it raises KeyboardInterrupt.
    """
    files = CampaignFiles(settings, spec.name)
    with log_to(files.log), anyio.CancelScope() as scope:
        async with open_lanes(settings, spec) as lanes:
            campaign = Campaign(settings, spec, folder, lanes)

            def drain() -> None:
                campaign.drain()
                on_drain()

            with on_interrupt(drain, scope):
                return await campaign.run(on_progress)
    raise KeyboardInterrupt


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Lines of the campaign's logger go to `path`, appended, times in UTC: plain `tail -f` works."""
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
