"""One campaign, from its spec to its files. Whatever happens, rerunning it continues: the files say what is still owed."""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio

from agents.lanes import Lane
from agents.providers.base import KeepsAnswers
from agents.scheduler import RunEnd, Scheduler
from agents.task import Completion, Outcome
from campaigns.domains.base import Domain, SourceItem, Verdict
from campaigns.domains.registry import domain
from campaigns.endpoints import policy_of
from campaigns.interrupt import on_interrupt
from campaigns.kept_budget import KeptBudget
from campaigns.lanes import check_lanes, open_lanes
from campaigns.late_bills import book_late_bills
from campaigns.live import Live, LiveState, RunView, serve_live
from campaigns.logs import log_call, log_end, log_event, log_start, log_to
from campaigns.memory import give_holes_back
from campaigns.metrics import Metrics, open_metrics
from campaigns.notify import notice_of, notify
from campaigns.plan import Cell, Plan
from campaigns.seen import answer_id
from campaigns.spec import CampaignSpec, source_files
from campaigns.status import CampaignEnd, Progress
from campaigns.store import Call, CampaignFiles, Rejected, Store
from config.contracts.base import content_id
from config.contracts.sample import Provenance, Sample
from config.errors import HafsError, StoreError
from config.settings import Settings

Show = Callable[[LiveState], None]


class Campaign:
    """A campaign being run. `progress` and `view` may be read at any time; `drain` lets what is in flight finish."""

    def __init__(
        self, settings: Settings, spec: CampaignSpec, folder: Path, lanes: Mapping[str, Lane], metrics: Metrics | None = None
    ) -> None:
        """`folder` is where relative sources start."""
        self.files = CampaignFiles(settings, spec.name)
        self.spec = spec
        self._domains: list[Domain] = [domain(name) for name in spec.domains]
        self.plan = Plan(spec, self._domains, {name: source_files(spec, name, folder) for name in spec.domains})
        self.progress = Progress(spec)
        self._lanes = lanes
        self._metrics = metrics or Metrics()
        found_again = [lane.price for lane in lanes.values() if lane.keeps and lane.price]
        self._budget = KeptBudget(spec.budget.max_usd, self.files.reserved, lambda: self.progress.cost_usd, found_again)
        self._scheduler: Scheduler | None = None
        self._store = Store(self.files, spec, version("hafs"), folder, on_pause=self._pause, on_resume=lambda: self._say(""))
        self._note = ""  # why it does not go on, where that is so

    def drain(self) -> None:
        """Start nothing new, and wait no longer for a disk that takes nothing."""
        self._say("draining")
        self._store.give_up()
        if self._scheduler:
            self._scheduler.drain()

    def view(self) -> RunView:
        lanes = self._scheduler.views() if self._scheduler else []
        self._metrics.observe_lanes(self.progress, lanes)
        return RunView(lanes, self._budget.reserved_usd, self._note)

    def _look(self) -> RunView:
        """`view`, once a second."""
        self._budget.trim()
        return self.view()

    async def run(self, show: Show, on_stop: Callable[[bool], None] = lambda now: None) -> CampaignEnd:
        """Work until the target is met or nothing more can be done. `on_stop` is told of a request to stop from outside.

        Raises:
            ProviderError: no lane works.
            StoreError: the files cannot be written (DiskFull, StoreHeld, …).
        """
        with self._store as store:
            self.plan.restore(store.tally.cells)
            self.progress.started(store.tally.counts)
            before, started = self.plan.accepted, time.monotonic()
            live = Live(self.files, self.progress)
            log_start(self.spec, self.progress, list(self._lanes.values()))
            end: CampaignEnd | HafsError | None = None  # None: cancelled
            try:
                end = self._ended(await self._work(store, live, show, on_stop), before)
            except HafsError as error:
                end = error
                raise
            except Exception as error:
                end = HafsError(f"{type(error).__name__}: {error}", hint="this is a bug in hafs; please report it")
                raise
            finally:
                end = end or self._end("drained", "stopped before its calls had ended", before)
                self._budget.trim()
                view = self.view()
                log_end(end, self.progress, view.lanes, time.monotonic() - started)
                live.publish(view, end)
                await notify(self.spec.notify, notice_of(end, self.progress))
        return end

    async def _work(self, store: Store, live: Live, show: Show, on_stop: Callable[[bool], None]) -> RunEnd:
        """The scheduler's run; beside it the figures are published and late bills booked."""
        scheduler = self._scheduler = Scheduler(
            list(self._lanes.values()),
            {name: self.spec.route(name) for name in self.spec.domains},
            self._budget,
            policy_of(self.spec),
            on_event=log_event,
        )
        await self._book_what_a_crash_left(store)
        self._budget.spent_usd = self.progress.cost_usd

        async def on_outcome(outcome: Outcome) -> None:
            self._count(await self._record(store, outcome))

        async def on_late_bill(call: Call) -> None:
            if store.ends_with(call):  # booked, and cut off before the batch was marked as billed
                return
            await store.append(call, None)
            self._budget.spent_usd += call.cost_usd
            self._count(call)

        failure: Exception | None = None
        async with anyio.create_task_group() as beside:
            beside.start_soon(serve_live, live, self.progress, self._look, on_stop, show)
            beside.start_soon(give_holes_back)
            try:
                ended = await scheduler.run(self.plan, on_outcome)
                if any(lane.mode == "batch" for lane in self.spec.lanes.values()):
                    await book_late_bills(self._lanes, next(iter(self.spec.domains)), on_late_bill)
            except Exception as error:  # raised below as itself, not inside an ExceptionGroup
                failure = error
            beside.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return ended

    async def _book_what_a_crash_left(self, store: Store) -> None:
        """Calls that were under way when an earlier run was cut off are taken to have cost what was reserved for them."""
        left = self._budget.left_behind()
        if left is None:
            return
        self._budget.spent_usd = self.progress.cost_usd + left.usd  # until it is booked it is not let go of
        call = Call(
            task_id=f"cut-off-{left.run}",
            domain=next(iter(self.spec.domains)),
            cell="",
            number=0,
            verdict="failed",
            reason="cut_off",
            detail="paid calls were under way when the campaign was cut off: what was reserved for them counts as spent",
            cost_usd=left.usd,
            cost_assumed=True,
            time=time.time(),
        )
        if not store.ends_with(call):  # booked, and cut off again before its reservation was removed
            await store.append(call, None)
            self._count(call)
        self._budget.spent_usd = self.progress.cost_usd
        self._budget.trim()

    def _ended(self, end: RunEnd, before: int) -> CampaignEnd:
        reason = "exhausted" if end.reason == "done" and self.plan.accepted < self.spec.target else end.reason
        return self._end(reason, end.message or f"{self.plan.accepted} of {self.spec.target} samples", before)

    def _end(self, reason: str, message: str, before: int) -> CampaignEnd:
        return CampaignEnd(reason, message, self.plan.accepted, self.plan.accepted - before, self._budget.spent_usd)

    async def _record(self, store: Store, outcome: Outcome) -> Call:
        """Check one outcome, write it, and only then tell the plan: what is on the disk is what counts."""
        cell, number, item = self.plan.item(outcome.task)
        completion = outcome.completion
        if completion is None:
            call, row = _call(outcome, cell, number, "failed", outcome.reason, outcome.error), None
        else:
            call, row = self._judged(store, outcome, completion, cell, number, item)
        await store.append(call, row)
        self._release(outcome)
        self.plan.ended(outcome, call.verdict == "accepted")
        return call

    def _release(self, outcome: Outcome) -> None:
        """What is on the disk here need not be kept there any more."""
        lane = self._lanes.get(outcome.lane)
        if lane and lane.keeps and outcome.completion and isinstance(lane.provider, KeepsAnswers):
            lane.provider.stored(lane.model, outcome.task.messages, outcome.task.sampling)

    def _judged(
        self, store: Store, outcome: Outcome, completion: Completion, cell: Cell, number: int, item: SourceItem
    ) -> tuple[Call, Sample | Rejected]:
        """The call and the row to keep of an answer."""
        text, answer = completion.text.strip(), ""
        verdict, detail = self._verdict(completion, cell, item, text)
        if verdict.accepted:
            answer = answer_id(item.id, text)
            if not store.claim(answer):  # the same sample twice teaches nothing
                verdict, answer = Verdict(False, "duplicate", verdict.proof), ""
        call = _call(outcome, cell, number, "accepted" if verdict.accepted else "rejected", verdict.reason, detail, answer)
        shared: dict[str, Any] = {
            "id": outcome.task.id,
            "domain": cell.domain.name,
            "source_id": item.id,
            "messages": cell.domain.question(item),
            "proof": verdict.proof,
            "provenance": _provenance(self.spec.name, outcome, call),
        }
        if verdict.accepted:
            return call, Sample.model_construct(completion=text, **shared)
        return call, Rejected.model_construct(completion=completion.text, reason=verdict.reason, **shared)

    def _verdict(self, completion: Completion, cell: Cell, item: SourceItem, text: str) -> tuple[Verdict, str]:
        """What the domain says of an answer; one that is not whole is never a sample."""
        if completion.finish_reason != "stop":
            return Verdict(False, f"finish_{completion.finish_reason}"), completion.detail
        verdict = cell.domain.verify(item, text)
        return (verdict if verdict.accepted or verdict.reason else Verdict(False, "rejected", verdict.proof)), ""

    def _count(self, call: Call) -> None:
        self.progress.count(call)
        log_call(call)
        if call.lane in self._lanes:
            self._metrics.observe_call(self._lanes[call.lane], call)

    def _pause(self, error: StoreError) -> None:
        self._say(f"paused: {error}; it goes on by itself once that is mended")

    def _say(self, note: str) -> None:
        self._note = note


def _call(outcome: Outcome, cell: Cell, number: int, verdict: str, reason: str = "", detail: str = "", answer: str = "") -> Call:
    completion = outcome.completion
    usage = completion.usage if completion else None
    return Call.model_construct(
        task_id=outcome.task.id,
        domain=outcome.task.domain,
        cell=cell.name,
        number=number,
        verdict=verdict,
        reason=reason,
        detail=detail,
        answer=answer,
        lane=outcome.lane,
        provider=outcome.provider,
        model=completion.model if completion else "",
        attempt=outcome.attempt,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        thinking_tokens=usage.thinking_tokens if usage else 0,
        cached_tokens=usage.cached_tokens if usage else 0,
        cost_usd=outcome.cost_usd,
        cost_assumed=outcome.cost_assumed,
        latency_s=completion.latency_s if completion else 0.0,
        time=time.time(),
    )


def _provenance(campaign: str, outcome: Outcome, call: Call) -> Provenance:
    return Provenance.model_construct(
        campaign=campaign,
        task_id=call.task_id,
        cell=call.cell,
        number=call.number,
        provider=call.provider,
        model=call.model,
        lane=call.lane,
        attempt=call.attempt,
        prompt_sha256=content_id([message.model_dump() for message in outcome.task.messages]),
        prompt_tokens=call.prompt_tokens,
        completion_tokens=call.completion_tokens,
        cost_usd=call.cost_usd,
        created_at=call.time,
    )


async def run_campaign(
    settings: Settings, spec: CampaignSpec, folder: Path, show: Show, on_drain: Callable[[], None]
) -> CampaignEnd:
    """Open the lanes, run the campaign in this process, write its log. `folder` is where relative sources start.

    Ctrl-C (or a request to stop) calls `on_drain` and lets what runs finish; again, it raises KeyboardInterrupt.
    """
    files = CampaignFiles(settings, spec.name)
    with log_to(files.log), open_metrics(spec.observe, spec.name) as metrics, anyio.CancelScope() as scope:
        async with _ready_lanes(settings, spec) as lanes:
            campaign = Campaign(settings, spec, folder, lanes, metrics)

            def drain() -> None:
                campaign.drain()
                on_drain()

            def stop(now: bool) -> None:
                drain()
                if now:
                    scope.cancel()

            with on_interrupt(drain, scope):
                return await campaign.run(show, stop)
    raise KeyboardInterrupt


@asynccontextmanager
async def _ready_lanes(settings: Settings, spec: CampaignSpec) -> AsyncIterator[dict[str, Lane]]:
    """The lanes of a spec, their models present. What is wrong with them is told as any other end of a campaign."""
    async with AsyncExitStack() as stack:
        try:
            lanes = await stack.enter_async_context(open_lanes(settings, spec))
            for missing in await check_lanes(spec, lanes):
                raise missing.error()
        except HafsError as error:
            progress = Progress(spec)
            log_end(error, progress, [], 0.0)
            await notify(spec.notify, notice_of(error, progress))
            raise
        yield lanes
