"""`hafs sync`: data to a node, results back."""

from typing import Annotated

import typer

app = typer.Typer(help="Ship data to a node, fetch results.", no_args_is_help=True)

Node = Annotated[str, typer.Option("--node", help="A node of nodes.toml; local is this machine.")]


@app.command()
def push(
    names: Annotated[list[str], typer.Argument(help="Campaigns or sets of pairs; several become one dataset.")],
    node: Node = "local",
    follow: Annotated[bool, typer.Option("--follow", help="Go on while a campaign runs, and end with it.")] = False,
) -> None:
    """Seal rows into segments and send what the node does not have yet."""
    if follow:
        return _follow(names, node)
    from campaigns.sync.remote import connecting
    from config.settings import load_settings

    settings = load_settings()
    with connecting(settings, node) as connected:  # what follows is loaded while the node answers
        from campaigns.cli import render
        from campaigns.datasets import sealing_named
        from campaigns.sync.push import push as push_dataset

        with sealing_named(settings, names) as sealing, render.transfer("sending") as on_bytes:
            result = push_dataset(connected(), sealing, on_bytes)
    render.left_out(sealing.result)
    render.pushed(result, node)


def _follow(names: list[str], node: str) -> None:
    from campaigns.cli import render, render_sync
    from campaigns.sync.follow import push_following
    from campaigns.sync.remote import node_named
    from config.settings import load_settings

    settings = load_settings()
    with node_named(settings, node) as remote, render.transfer("sending") as on_bytes:
        result = push_following(settings, remote, names, on_bytes, lambda each: render_sync.round_of(node, each))
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


@app.command()
def gc(
    node: Node = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Remove what nobody needs: here, packed rows; on the node, broken uploads and data that no job and no dataset names."""
    from campaigns.cli import render_sync
    from campaigns.sync.gc import collect
    from campaigns.sync.remote import connect
    from config.contracts.wire import GC, GcArgs
    from config.settings import load_settings

    settings = load_settings()
    with connect(settings, node) as remote:
        there = remote.call(GC, GcArgs(dry_run=dry_run)).garbage
    render_sync.garbage({"this machine": collect(settings, dry_run=dry_run), f"node {node}": there}, dry_run, as_json)
