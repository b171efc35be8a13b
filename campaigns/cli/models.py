"""`hafs models`: what the nodes have registered."""

from typing import Annotated

import typer

app = typer.Typer(help="The models you made.", no_args_is_help=True)


@app.command("list")
def list_(
    node: Annotated[str, typer.Option("--node", help="A node of nodes.toml; local is this machine.")] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions of your models on a node, newest last."""
    from campaigns.cli import render
    from campaigns.sync.remote import connect
    from config.contracts.wire import MODELS, Nothing
    from config.settings import load_settings

    with connect(load_settings(), node) as remote:
        render.models(remote.call(MODELS, Nothing()).models, as_json)
