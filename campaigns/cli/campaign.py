"""`hafs campaign`: start a campaign, see how far it is, follow its log."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Generate samples with model servers.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def start(spec: Annotated[Path, typer.Argument(help="The campaign's TOML file.")]) -> None:
    """Run a campaign in this terminal, or continue one. Ctrl-C once finishes what runs, twice stops at once."""
    from campaigns.cli import render
    from campaigns.cli.campaign_live import run_live
    from campaigns.spec import load_campaign
    from config.settings import load_settings

    try:
        end = run_live(load_settings(), load_campaign(spec), spec.parent)
    except KeyboardInterrupt:
        render.note("stopped; the same command continues where this one ended")
        raise
    render.campaign_end(end)
    if code := render.campaign_exit_code(end):
        raise typer.Exit(code)


@app.command()
def status(name: str, as_json: Json = False) -> None:
    """How far a campaign is: per domain, accept rate, why answers were rejected, cost."""
    from campaigns.cli import render
    from campaigns.status import CampaignStatus
    from config.settings import load_settings

    render.campaign_status(CampaignStatus(load_settings(), name), as_json)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """All campaigns below HAFS_HOME."""
    from campaigns.cli import render
    from campaigns.status import CampaignStatus, names
    from config.settings import load_settings

    settings = load_settings()
    render.campaign_list([CampaignStatus(settings, name) for name in names(settings)], as_json)


@app.command()
def logs(
    name: str, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows; Ctrl-C ends it.")] = False
) -> None:
    """The campaign's log."""
    from campaigns.cli import render
    from campaigns.logs import log_lines
    from config.settings import load_settings

    for line in log_lines(load_settings(), name, follow):
        render.line(line)
