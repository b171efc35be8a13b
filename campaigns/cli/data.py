"""`hafs data`: look at the rows a campaign made; make preference pairs of them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at samples and make preference pairs.", no_args_is_help=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A campaign, or a set of pairs.")],
    count: Annotated[int, typer.Option("-n", help="How many rows.")] = 5,
    rejected: Annotated[bool, typer.Option("--rejected", help="What was rejected, and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON lines.")] = False,
) -> None:
    """Rows of a campaign's samples.jsonl or rejected.jsonl, or of a set of pairs."""
    from campaigns.cli import render
    from campaigns.datasets import find, find_rejected, rows
    from config.settings import load_settings

    settings = load_settings()
    path = find_rejected(settings, name) if rejected else find(settings, name)[1]
    for row in rows(path, count):
        render.row(row, as_json)


@app.command()
def pairs(
    spec: Annotated[Path, typer.Argument(help="The campaign's TOML file.")],
    name: Annotated[str, typer.Option(help="Name of the set of pairs.")],
) -> None:
    """Make preference pairs of a campaign's samples: the accepted answer against one with a single fact broken."""
    from campaigns.cli import render
    from campaigns.datasets import pairs_file
    from campaigns.pairs import make_pairs
    from campaigns.spec import load_campaign
    from config.settings import load_settings

    settings = load_settings()
    made = make_pairs(settings, load_campaign(spec), spec.parent, name, render.line)
    render.line(f"{made} pairs: {pairs_file(settings, name)}")
