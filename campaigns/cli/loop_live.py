"""`hafs run` in the terminal."""

from pathlib import Path

from campaigns.cli import render, render_campaign, render_train
from campaigns.cli.campaign_live import run_live
from campaigns.cli.train_live import watch
from campaigns.loop import Loop, LoopResult
from campaigns.spec import CampaignSpec
from campaigns.status import CampaignEnd
from campaigns.sync.push import PushResult
from config.contracts.job import JobView
from config.settings import Settings


class Terminal:
    """The Screen of the loop."""

    def step(self, number: int, of: int, title: str) -> None:
        render.heading(f"[{number}/{of}] {title}")

    def say(self, text: str) -> None:
        render.line(text)

    def run_campaign(self, settings: Settings, spec: CampaignSpec, folder: Path) -> CampaignEnd:
        end = run_live(settings, spec, folder)
        render_campaign.campaign_end(end)
        return end

    def sending(self, done: int, total: int) -> None:
        """A push of the loop is told when it ends."""

    def pushed(self, result: PushResult, node: str) -> None:
        render.pushed(result, node)

    def follow(self, settings: Settings, node: str, job: str) -> JobView:
        render.line(f"following job {job}; Ctrl-C leaves it running, the same command comes back to it")
        render.line(f"to stop the job itself: {render.command('train', 'cancel', job, node=node)}")
        ended = watch(settings, node, job, render_train.log)
        render.job_end(ended)
        return ended

    def sheet(self, title: str, questions: int, kept: bool) -> None:
        render.line(f"{title}: {questions} questions{' (reused)' if kept else ''}")


def chat_command(loop: Loop, result: LoopResult) -> str:
    """The command that talks to the new model, as it has to be typed in this shell and folder."""
    assert result.job.result is not None, "a job that succeeded has a result"
    model = result.job.result.alias or result.job.result.model
    return render.command("chat", model.removesuffix(":latest"), "--prompt", loop.job.probe, node=loop.spec.node)
