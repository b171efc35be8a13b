"""`hafs run` and `hafs status`."""

from pathlib import Path
from typing import Annotated

import typer


def run(file: Annotated[Path, typer.Argument(help="The loop's TOML file, for example config/presets/demo.toml.")]) -> None:
    """The whole loop: campaign, push, train, evaluate. Run it again and it continues, reusing what is there."""
    from campaigns.cli import render
    from campaigns.cli.loop_live import Terminal, chat_command
    from campaigns.loop import load_loop, run_loop
    from config.settings import load_settings

    settings = load_settings()
    loop = load_loop(settings, file)
    try:
        result = run_loop(settings, loop, Terminal())
    except KeyboardInterrupt:
        render.note("stopped; the same command continues where this one ended")
        raise
    render.loop_result(result, chat_command(loop, result))


def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """The whole loop on one screen: campaigns, jobs and models of this machine and of every node."""
    from campaigns.cli import render_overview
    from campaigns.overview import overview
    from config.settings import load_settings

    render_overview.overview(overview(load_settings()), as_json)
