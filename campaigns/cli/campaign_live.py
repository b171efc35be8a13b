"""A campaign in the terminal: a live table where there is a terminal, a line now and then where there is none."""

import time
from pathlib import Path

import anyio
from rich.live import Live

from campaigns.cli import render
from campaigns.run import run_campaign
from campaigns.spec import CampaignSpec
from campaigns.status import CampaignEnd, Progress
from config.settings import Settings

LINE_EVERY_S = 10.0


def run_live(settings: Settings, spec: CampaignSpec, folder: Path) -> CampaignEnd:
    """Run the campaign and show its progress."""
    render.line(f"campaign {spec.name}: {spec.target} samples wanted, log: {render.log_hint(settings, spec.name)}")
    if not render.console.is_terminal:
        return anyio.run(run_campaign, settings, spec, folder, _Lines().show, _draining)
    with Live(console=render.console, refresh_per_second=4, transient=True) as live:
        return anyio.run(run_campaign, settings, spec, folder, lambda p: live.update(render.progress_table(p)), _draining)


def _draining() -> None:
    render.line("finishing what runs; Ctrl-C again stops at once")


class _Lines:
    def __init__(self) -> None:
        self._next = time.monotonic() + LINE_EVERY_S

    def show(self, progress: Progress) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY_S
            render.line(render.progress_line(progress))
