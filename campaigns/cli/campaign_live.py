"""A campaign in the terminal: a live table where there is a terminal, a line now and then where there is none."""

import signal
import time
from contextlib import suppress
from pathlib import Path

import anyio
import typer

from campaigns import detach, live
from campaigns.cli import render, render_campaign
from campaigns.cli.screen import Screen
from campaigns.live import LiveState
from campaigns.picture import Picture, as_told, look_at
from campaigns.run import run_campaign
from campaigns.spec import CampaignSpec
from campaigns.status import CampaignEnd
from campaigns.store import CampaignFiles
from config.errors import StoreError
from config.settings import Settings

LINE_EVERY_S = 10.0
LOOK_EVERY_S = 0.5  # a file has no portable event to wait for


def run_live(settings: Settings, spec: CampaignSpec, folder: Path) -> CampaignEnd:
    """Run the campaign and show its progress."""
    files = CampaignFiles(settings, spec.name)
    render.line(f"campaign {spec.name}: {spec.target} samples wanted, log: {files.log}")
    with _Screen() as screen:

        def show(state: LiveState) -> None:
            try:
                with suppress(StoreError):  # a full disk makes a campaign pause, not end
                    screen.show(as_told(files, state))
            except SystemExit:  # nobody reads it any more: as with a terminal that was closed, what runs is finished
                signal.raise_signal(signal.SIGINT)

        return anyio.run(run_campaign, settings, spec, folder, show, _draining)


def run_here(settings: Settings, spec: CampaignSpec, folder: Path) -> int:
    """Run the campaign in this process and say how it ended; returns the exit code."""
    try:
        end = run_live(settings, spec, folder)
    except KeyboardInterrupt:
        render.note(f"stopped; go on with: {render.command('campaign', 'resume', spec.name)}")
        raise
    render_campaign.campaign_end(end)
    _tell_next(look_at(settings, spec.name))
    return render_campaign.campaign_exit_code(end)


def run_detached(settings: Settings, name: str, again: list[str], max_usd: float | None) -> int:
    """Run `hafs campaign AGAIN` in the background and say how to come back to it, or why it did not start."""
    files = CampaignFiles(settings, name)
    budget = [] if max_usd is None else ["--max-usd", str(max_usd)]
    render.note("starting; waiting for its first answer")
    outcome = detach.start_detached(files, ["campaign", *again, *budget])
    if outcome.exit_code is None:
        render_campaign.started(name, str(files.log), outcome)
        return 0
    typer.echo(render.printable(outcome.words), nl=False, err=True)
    state = live.read(files)
    if not outcome.words and state and state.end:
        render_campaign.campaign_end(state.end)
    return outcome.exit_code if outcome.exit_code >= 0 else 1


def stop_and_wait(settings: Settings, name: str, *, now: bool) -> None:
    """Ask a campaign to stop, wait for its end, and say where it stands."""
    seen = look_at(settings, name)
    if not seen.running:
        return render.line(f"{name} is not running: {seen.state}")
    running = sum(lane.in_flight for lane in seen.lanes)
    calls = f"{running or 'no'} call{'' if running == 1 else 's'}"
    render.line(f"asked process {seen.pid} to stop; it {'cancels' if now else 'finishes'} what runs ({calls})")
    detach.stop(seen.files, seen, now=now)
    _tell_end(look_at(settings, name))


def watch(settings: Settings, name: str) -> None:
    """Show a campaign until its process has ended, then how it ended."""
    seen = look_at(settings, name)
    with _Screen() as screen:
        while seen.running:
            screen.show(seen)
            time.sleep(LOOK_EVERY_S)
            seen = look_at(settings, name)
    render_campaign.campaign_status(seen, False)
    if seen.end:
        render_campaign.campaign_end(seen.end)


def _tell_end(seen: Picture) -> None:
    if seen.end:
        render_campaign.campaign_end(seen.end)
    else:
        render.line(f"{seen.name}: {seen.state}")
    _tell_next(seen)


def _tell_next(seen: Picture) -> None:
    for what, words in render_campaign.next_commands(seen):
        render.line(f"{what}: {words}")


def _draining() -> None:
    with suppress(SystemExit, StoreError):  # its reader may have had the same Ctrl-C: hafs campaign start … | tee FILE
        render.line("finishing what runs; Ctrl-C again stops at once")


class _Screen(Screen):
    """Where pictures of a campaign go, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._next = time.monotonic() + LINE_EVERY_S

    def show(self, seen: Picture) -> None:
        if self.live:
            self.draw(render_campaign.campaign_view(seen))
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY_S
            render.line(render_campaign.progress_line(seen))
