"""`hafs run`: the steps of the whole loop, each resumable by itself.

No step trusts a note that it was done: the campaign counts its files, the push asks the node what it has, training asks the node
for the job that this loop submitted, the evaluation keeps each finished answer sheet under a name made of all that went into it.
So a rerun does what is missing and nothing else, wherever the last one was cut off. One thing is noted: of which job it promoted
the model, so that what a person rolled back since then stays so.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio

from agents.providers.ollama import OllamaProvider
from campaigns.datasets import sealing_named
from campaigns.domains.registry import domain
from campaigns.evaluation.compare import compare
from campaigns.evaluation.report import Evaluation, markdown
from campaigns.serving import Server, server_of
from campaigns.spec import CampaignSpec, LoopSpec, beside, load_campaign
from campaigns.status import CampaignEnd, CampaignStatus
from campaigns.store import CampaignFiles
from campaigns.sync.push import PushResult, push
from campaigns.sync.remote import connect, connecting
from campaigns.training import attach_or_submit, complete, require_success
from campaigns.versions import keep_benchmarks, objection, promote
from config.contracts.job import JobSpec, JobState, JobView
from config.contracts.wire import MODELS, Nothing
from config.errors import BudgetExceeded, ConfigError, HafsError
from config.files import write_atomic
from config.settings import LOCAL, Settings
from config.toml import load_toml


class Screen(Protocol):
    """What the loop shows of itself; the terminal is one, a test may be another."""

    def step(self, number: int, of: int, title: str) -> None: ...
    def say(self, text: str) -> None: ...
    def run_campaign(self, settings: Settings, spec: CampaignSpec, folder: Path) -> CampaignEnd: ...
    def sending(self, done: int, total: int) -> None: ...
    def pushed(self, result: PushResult, node: str) -> None: ...
    def follow(self, settings: Settings, node: str, job: str) -> JobView: ...
    def sheet(self, title: str, questions: int, kept: bool) -> None: ...


@dataclass(frozen=True)
class Loop:
    """A loop file with the files it names, all checked before anything starts."""

    path: Path
    spec: LoopSpec
    campaign_path: Path
    campaign: CampaignSpec
    job: JobSpec


@dataclass(frozen=True)
class LoopResult:
    job: JobView
    evaluations: list[Evaluation]
    report: Path
    seconds: dict[str, float]  # by step, this run


def load_loop(settings: Settings, path: Path) -> Loop:
    """Raises ConfigError (SourceMissing) for any of the three files, an unknown node or an unknown domain."""
    spec = load_toml(path, LoopSpec)
    campaign_path, job_path = beside(path, "campaign", spec.campaign), beside(path, "train", spec.train)
    campaign, job = load_campaign(campaign_path), load_toml(job_path, JobSpec)
    if spec.node != LOCAL:
        settings.node(spec.node)
    for name in campaign.domains:
        domain(name)
    if job.kind != "sft":
        raise ConfigError(f"{job_path}: the loop trains with sft", hint="submit a dpo job with: hafs train submit FILE")
    if campaign.name not in job.data:
        raise ConfigError(f'{job_path}: data does not name the campaign "{campaign.name}"', hint=f'data = ["{campaign.name}"]')
    return Loop(path, spec, campaign_path, campaign, job)


def run_loop(settings: Settings, loop: Loop, screen: Screen) -> LoopResult:
    """All steps in order. Raises HafsError where one cannot be finished; rerunning continues there."""
    clock = _Clock(screen)
    with clock.step(1, "campaign"):
        _campaign(settings, loop, screen)
    with clock.step(2, "push"):
        dataset_id = _push(settings, loop, screen)
    with clock.step(3, "train"):
        job = _train(settings, loop, dataset_id, screen)
    with clock.step(4, "evaluate"):
        evaluations = _evaluate(settings, loop, job, screen)
    report = settings.loops / loop.spec.name / "report.md"
    write_atomic(report, "\n".join(markdown(evaluation) for evaluation in evaluations).encode())
    keep_benchmarks(settings, loop.spec.name, job, evaluations)
    if loop.job.export.promote == "eval":
        _promote(settings, loop, job, evaluations, screen)
    return LoopResult(job, evaluations, report, clock.seconds)


class _Clock:
    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        self._screen.step(number, 4, title)
        begin = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - begin


def _campaign(settings: Settings, loop: Loop, screen: Screen) -> None:
    spec = loop.campaign
    if CampaignFiles(settings, spec.name).exists():
        status = CampaignStatus(settings, spec.name)
        if status.state == "complete" and status.spec == spec:
            return screen.say(f"reused: {status.done} samples of an earlier run ({status.files.samples})")
        screen.say(f"continuing: {status.done} of {spec.target} samples are there")
    end = screen.run_campaign(settings, spec, loop.campaign_path.parent)
    if end.reason == "drained":
        raise KeyboardInterrupt
    if end.reason == "budget":
        raise BudgetExceeded(end.message, hint=f"raise max_usd or lower target in {loop.campaign_path}, then run this again")
    if end.accepted < spec.target:
        raise HafsError(
            f"campaign {spec.name}: no cell of the plan has calls left; {end.accepted} of {spec.target} samples were accepted",
            hint=f"see why: hafs campaign status {spec.name}; then lower target in {loop.campaign_path} or use a better teacher",
        )


def _push(settings: Settings, loop: Loop, screen: Screen) -> str:
    with connecting(settings, loop.spec.node) as connected, sealing_named(settings, loop.job.data) as sealing:
        result = push(connected(), sealing, screen.sending)
    screen.pushed(result, loop.spec.node)
    return result.dataset_id


def _train(settings: Settings, loop: Loop, dataset_id: str, screen: Screen) -> JobView:
    job, new = attach_or_submit(settings, loop.spec.node, complete(settings, loop.job), dataset_id)
    if job.state is JobState.SUCCEEDED:
        screen.say(f"reused: job {job.id} of an earlier run trained on exactly this")
        return job
    screen.say(f"submitted: job {job.id}" if new else f"attached: job {job.id} goes on")
    return require_success(screen.follow(settings, loop.spec.node, job.id))


def _evaluate(settings: Settings, loop: Loop, job: JobView, screen: Screen) -> list[Evaluation]:
    result = job.result
    assert result is not None, "a job that succeeded has a result"

    async def run(server: Server) -> list[Evaluation]:
        provider = OllamaProvider(server.url)
        try:
            return [
                await compare(
                    provider,
                    base=server.model,
                    tuned=result.model,
                    made_by=job.id,
                    domain_name=name,
                    wanted=loop.spec.evaluate,
                    perplexity=result.perplexity,
                    folder=settings.loops / loop.spec.name / "answers",
                    on_sheet=screen.sheet,
                )
                for name in loop.campaign.domains
            ]
        finally:
            await provider.aclose()

    with connect(settings, loop.spec.node) as node:
        trained_on = next((made.base for made in node.call(MODELS, Nothing()).models if made.tag == result.model), loop.job.base)
        with server_of(node, gguf=trained_on) as server:
            return anyio.run(run, server)


def _promote(settings: Settings, loop: Loop, job: JobView, evaluations: list[Evaluation], screen: Screen) -> None:
    """Let the aliases name the new model where the benchmarks speak for it, once; say what became of them."""
    result, promoted = job.result, settings.loops / loop.spec.name / "promoted"
    assert result is not None, "a job that succeeded has a result"
    where = "" if loop.spec.node == LOCAL else f" --node {loop.spec.node}"
    if promoted.exists() and promoted.read_text(encoding="utf-8") == job.id:
        return screen.say(f"promoted by an earlier run; what the aliases name now: hafs models list{where}")
    if reason := objection(evaluations):
        return screen.say(f"no alias was moved: {reason}; to move them all the same: hafs models promote {result.model}{where}")
    with connect(settings, loop.spec.node) as node:
        changed = promote(node, result.model)
    for made in changed.models:
        aliases = " and ".join(made.aliases)
        screen.say(f"promoted, as it beats its base: {made.tag} is {aliases}" if aliases else f"{made.tag} carries no alias")
    for note in changed.notes:
        screen.say(note)
    write_atomic(promoted, job.id.encode())
