"""`hafs nodes`: the machines that train."""

from typing import Annotated

import typer

app = typer.Typer(help="The machines that train.", no_args_is_help=True)


@app.command()
def trust(
    name: Annotated[str, typer.Argument(help="A node of nodes.toml.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: you have compared the fingerprint.")] = False,
) -> None:
    """Show a node's host key and pin it. Compare the fingerprint with the one the machine itself shows."""
    from campaigns.cli import render
    from campaigns.sync import ssh
    from config.settings import load_settings

    settings = load_settings()
    key = ssh.fetch_host_key(settings, name)
    render.line(f"{name} shows the key {key.type} {key.fingerprint} for {key.host}")
    if not yes:
        typer.confirm("Is this the key that ssh-keygen -lf prints on that machine?", abort=True)
    ssh.trust(settings, name, key)
    render.line(f"pinned in {settings.known_hosts}")


@app.command()
def check(name: Annotated[str, typer.Argument(help="A node of nodes.toml, or local.")] = "local") -> None:
    """Connect to a node and say what answers."""
    from campaigns.cli import render
    from campaigns.sync.remote import connect
    from config.contracts.wire import PING, Nothing
    from config.settings import load_settings

    with connect(load_settings(), name) as remote:
        pong = remote.call(PING, Nothing())
    daemon = "running" if pong.daemon else "starts with the next job"
    render.line(f"{name}: hafs {pong.hafs} on {pong.platform}, root {pong.root}, daemon {daemon}")
