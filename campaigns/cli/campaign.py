"""`hafs campaign`: start a campaign here or in the background, see how far it is, stop it, go on with it."""

from pathlib import Path
from typing import Annotated

import typer

from campaigns.cli import campaign_check

app = typer.Typer(help="Generate samples with model servers.", no_args_is_help=True)

app.command()(campaign_check.check)
app.command()(campaign_check.simulate)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="The campaign's name; see: hafs campaign list")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Run in the background; it survives this terminal.")]
MaxUsd = Annotated[float | None, typer.Option("--max-usd", min=0, help="Limit of what it may cost, instead of the spec's.")]


@app.command()
def start(
    spec: Annotated[Path, typer.Argument(help="The campaign's TOML file.")],
    detach: Detach = False,
    max_usd: MaxUsd = None,
    name: Annotated[str, typer.Option("--name", help="Another name than the spec's; {date} stands for today.")] = "",
) -> None:
    """Run a campaign, or continue one. Ctrl-C once finishes what runs, twice stops at once."""
    from campaigns.cli import campaign_live
    from campaigns.revise import with_budget
    from campaigns.spec import load_campaign
    from config.settings import load_settings

    loaded = with_budget(load_campaign(spec, name), max_usd)
    if detach:
        again = ["start", str(spec.resolve()), "--name", loaded.name]
        raise typer.Exit(campaign_live.run_detached(load_settings(), loaded.name, again, max_usd))
    raise typer.Exit(campaign_live.run_here(load_settings(), loaded, spec.parent))


@app.command()
def resume(name: Name, detach: Detach = False, max_usd: MaxUsd = None) -> None:
    """Go on with a campaign that was stopped, from what is stored of it: its TOML file is not needed."""
    from campaigns.cli import campaign_live
    from campaigns.picture import find
    from campaigns.revise import stored
    from config.settings import load_settings

    settings = load_settings()
    spec, folder = stored(find(settings, name), max_usd=max_usd)
    if detach:
        raise typer.Exit(campaign_live.run_detached(settings, name, ["resume", name], max_usd))
    raise typer.Exit(campaign_live.run_here(settings, spec, folder))


@app.command()
def extend(
    name: Name,
    target: Annotated[int | None, typer.Option("--target", help="Accepted samples wanted in all.")] = None,
    by: Annotated[int | None, typer.Option("--by", help="Accepted samples wanted beyond the present target.")] = None,
    max_usd: MaxUsd = None,
) -> None:
    """Give a campaign another target or budget; it takes effect when it is resumed."""
    from campaigns.cli import render_campaign
    from campaigns.picture import find
    from campaigns.revise import extend
    from config.settings import load_settings

    render_campaign.extended(name, extend(find(load_settings(), name), target=target, by=by, max_usd=max_usd))


@app.command()
def stop(
    name: Name, now: Annotated[bool, typer.Option("--now", help="Cancel what runs instead of finishing it.")] = False
) -> None:
    """Stop a campaign that runs, here or in the background, and wait until it has ended. It can be resumed."""
    from campaigns.cli import campaign_live
    from config.settings import load_settings

    campaign_live.stop_and_wait(load_settings(), name, now=now)


@app.command()
def status(name: Name, as_json: Json = False) -> None:
    """How far a campaign is, why answers were rejected, what it cost, what each lane does."""
    from campaigns.cli import render_campaign
    from campaigns.picture import look_at
    from config.settings import load_settings

    render_campaign.campaign_status(look_at(load_settings(), name), as_json)


@app.command()
def watch(name: Name) -> None:
    """The status as it changes, until the campaign ends. Ctrl-C ends the watching only."""
    from campaigns.cli import campaign_live
    from config.settings import load_settings

    campaign_live.watch(load_settings(), name)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """All campaigns below HAFS_HOME."""
    from campaigns.cli import render_campaign
    from campaigns.picture import look_at
    from campaigns.status import names
    from config.settings import load_settings

    settings = load_settings()
    render_campaign.campaign_list([look_at(settings, name) for name in names(settings)], as_json)


@app.command()
def report(name: Name, as_json: Json = False) -> None:
    """What became of a campaign: domains, lanes, reasons, cost, where time went. Piped, it is Markdown."""
    from campaigns.cli import render_campaign
    from campaigns.report import report_of
    from config.settings import load_settings

    render_campaign.campaign_report(report_of(load_settings(), name), as_json)


@app.command()
def logs(
    name: Name, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows; Ctrl-C ends it.")] = False
) -> None:
    """The campaign's log."""
    from campaigns.cli import render
    from campaigns.logs import log_lines
    from config.settings import load_settings

    for line in log_lines(load_settings(), name, follow):
        render.line(line)
