"""`hafs nodes`: the machines that train."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from campaigns.sync.hostkeys import HostKey

app = typer.Typer(help="The machines that train.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A node of nodes.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Fingerprints = Annotated[
    list[str] | None,
    typer.Option("--yes-fingerprint", help="SHA256:…, for scripts: a key to accept unasked; repeatable."),
]
Python = Annotated[str | None, typer.Option(help="The node's Python, 3.11 or newer; default: found.")]
PipArgs = Annotated[str | None, typer.Option(help="Options for every call of pip, such as '--no-index --find-links D:/wheels'.")]
TorchArgs = Annotated[
    str | None,
    typer.Option(help="Options for installing torch, such as '--index-url URL'; default: what fits its GPU."),
]
Service = Annotated[bool | None, typer.Option("--service/--no-service", help="Run the daemon as a service there; default: yes.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    host: Annotated[str, typer.Argument(help="A host name, an address, or an alias of ~/.ssh/config.")],
    user: Annotated[str, typer.Option(help="Default: as ssh would log in.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Default: as ssh would connect.")] = 0,
    identity: Annotated[str, typer.Option(help="A private key file; default: those of ssh, and the agent.")] = "",
    jump: Annotated[str, typer.Option(help="Hosts to go through, as ssh -J: [user@]host[:port],…")] = "",
    command: Annotated[str, typer.Option(help="The hafs-node there; `hafs nodes setup` fills it in.")] = "hafs-node",
    root: Annotated[str, typer.Option(help="The folder where it keeps everything, such as D:/hafs; default: its own.")] = "",
    fingerprint: Fingerprints = None,
) -> None:
    """Write a node into nodes.toml and pin its host key, once you have compared the fingerprint."""
    from campaigns import nodes
    from campaigns.cli import render
    from campaigns.nodes_file import described_node
    from config.settings import load_settings

    settings = load_settings()
    node = described_node(host=host, user=user, port=port, identity=identity, jump=jump, command=command, root=root)
    nodes.add(settings, name, node, nodes.approve_listed(fingerprint) if fingerprint else _ask)
    render.line(f"{name} is in {settings.nodes_file}; hafs onto it: {render.command('nodes', 'setup', name)}")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Every node: does it answer, which hafs, daemon and queue."""
    from campaigns import nodes
    from campaigns.cli import render_nodes
    from config.settings import load_settings

    render_nodes.states(nodes.look_at_all(load_settings()), as_json)


@app.command()
def trust(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: you have compared the fingerprint.")] = False,
    fingerprint: Fingerprints = None,
) -> None:
    """Show a node's host key and pin it. Compare the fingerprint with the one the machine itself shows."""
    from campaigns import nodes
    from campaigns.cli import render
    from config.settings import load_settings

    settings = load_settings()
    approve = _show if yes else nodes.approve_listed(fingerprint) if fingerprint else _ask
    pinned = nodes.trust_way(settings, name, approve)
    render.line(f"pinned in {settings.known_hosts}" if pinned else f"{name} shows the key that is pinned already")


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


@app.command()
def doctor(name: Annotated[str, typer.Argument(help="A node of nodes.toml, or local.")] = "local", as_json: Json = False) -> None:
    """Let a node examine itself: one line each, ok or what to do. Exit code 1 if anything is wrong."""
    from campaigns import nodes
    from campaigns.cli import render_nodes
    from config.settings import load_settings

    checks = nodes.examine(load_settings(), name)
    render_nodes.checks(checks, as_json)
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@app.command()
def setup(
    name: Name, python: Python = None, pip_args: PipArgs = None, torch_args: TorchArgs = None, service: Service = None
) -> None:
    """Install this hafs on a node that has sshd and Python: environment, torch for its GPU, service; then its doctor."""
    _set_up(name, python, pip_args, torch_args, service)


@app.command()
def upgrade(
    name: Name, python: Python = None, pip_args: PipArgs = None, torch_args: TorchArgs = None, service: Service = None
) -> None:
    """Give a node the hafs of this machine, beside the old one; a running job keeps the old one until it ends."""
    _set_up(name, python, pip_args, torch_args, service)


@app.command()
def remove(name: Name) -> None:
    """Forget a node and its host key. What is on the machine stays."""
    from campaigns import nodes
    from campaigns.cli import render
    from config.settings import load_settings

    nodes.remove(load_settings(), name)
    render.line(f"{name} is forgotten; on the machine itself `hafs-node uninstall` stops the service")


def _set_up(name: str, python: str | None, pip_args: str | None, torch_args: str | None, service: bool | None) -> None:
    from campaigns.cli import render_nodes
    from campaigns.sync.setup import Options, option_words, setup
    from config.settings import load_settings

    options = Options(python, option_words(pip_args), option_words(torch_args), service)
    with render_nodes.setting_up(name) as progress:
        checks = setup(load_settings(), name, options, progress)
    render_nodes.checks(checks, False)
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


def _show(key: "HostKey") -> bool:
    from campaigns.cli import render

    render.line(f"{key.host} shows the key {key.type} {key.fingerprint}")
    return True


def _ask(key: "HostKey") -> bool:
    try:
        return _show(key) and typer.confirm("Is this the key that `ssh-keygen -lf` prints of /etc/ssh on that machine?")
    except typer.Abort:  # nobody is there to ask
        typer.echo()
        return False
