"""`hafs sync`: data to a node, results back."""

from typing import Annotated

import typer

app = typer.Typer(help="Ship data to a node, fetch results.", no_args_is_help=True)

Node = Annotated[str, typer.Option("--node", help="A node of nodes.toml; local is this machine.")]


@app.command()
def push(names: Annotated[list[str], typer.Argument(help="Campaigns or sets of pairs.")], node: Node = "local") -> None:
    """Seal rows into segments and send what the node does not have yet."""
    from campaigns.cli import render
    from campaigns.datasets import seal_named
    from campaigns.sync.push import push as push_dataset
    from campaigns.sync.remote import connect
    from config.settings import load_settings

    settings = load_settings()
    sealed = seal_named(settings, names)
    render.left_out(sealed)
    with connect(settings, node) as remote, render.transfer("sending") as on_bytes:
        result = push_dataset(remote, sealed, on_bytes)
    render.pushed(result, node)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="A model of the node: hafs-coder, or hafs-coder:v2.")], node: Node = "local"
) -> None:
    """Fetch a model's adapter, metrics and statistics into HAFS_HOME/models."""
    from campaigns.cli import render
    from campaigns.sync.pull import pull as pull_model
    from campaigns.sync.remote import connect
    from config.settings import load_settings

    settings = load_settings()
    with connect(settings, node) as remote, render.transfer("fetching") as on_bytes:
        folder = pull_model(remote, settings, model, on_bytes)
    render.line(f"{model}: {folder}")
