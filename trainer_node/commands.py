"""The commands of `hafs-node`. Each loads what it needs when it is called; errors are told by `trainer_node.cli`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trainer_node.cli import root_folder

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="The trainer node of hafs.")

Root = Annotated[Path | None, typer.Option(help="The node's folder; default: HAFS_HOME/node.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
IdleExit = Annotated[float | None, typer.Option(min=0, help="Exit after so many idle seconds; default: stay.")]


@app.command()
def daemon(root: Root = None, idle_exit: IdleExit = None) -> None:
    """Run the queued jobs, one at a time."""
    from trainer_node.daemon import Daemon

    Daemon(root_folder(root), idle_exit_s=idle_exit).serve()


@app.command()
def rpc(root: Root = None) -> None:
    """Serve one connection on stdin and stdout: one line of JSON a request, one a reply."""
    from trainer_node.rpc import serve_stdio

    serve_stdio(root_folder(root))


@app.command()
def runtime(
    root: Root = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any free one.")] = 0,
    idle_exit: IdleExit = None,
) -> None:
    """Serve the models of this node to Ollama clients, on a machine without Ollama."""
    from trainer_node.runtime.server import serve

    serve(root_folder(root), port, idle_exit)


@app.command()
def install(root: Root = None) -> None:
    """Run the daemon as a service: after a reboot, and when nobody is logged in. Again: with this environment."""
    from trainer_node.service.install import install as install_service

    typer.echo(install_service(root_folder(root)))


@app.command()
def uninstall(root: Root = None) -> None:
    """Stop and remove the service. A running job goes on; data and models stay."""
    from trainer_node.service.install import uninstall as uninstall_service

    typer.echo(uninstall_service(root_folder(root)))


@app.command()
def prune(root: Root = None) -> None:
    """Remove the environments of earlier versions that nothing runs from any more."""
    from trainer_node.environments import remove_unused

    typer.echo(f"removed: {', '.join(remove_unused(root_folder(root))) or 'nothing'}")


@app.command()
def status(root: Root = None, as_json: Json = False) -> None:
    """What runs here: version, service, daemon, jobs."""
    from trainer_node.report import node_status

    seen = node_status(root_folder(root))
    typer.echo(json.dumps(seen, indent=1) if as_json else "\n".join(f"{name:<12}{value}" for name, value in seen.items()))


@app.command()
def doctor(root: Root = None, as_json: Json = False) -> None:
    """Say what is missing: one line each, ok or what to do. Exit code 1 if anything is."""
    from trainer_node.doctor import examine

    checks = examine(root_folder(root))
    if as_json:
        typer.echo(json.dumps([check._asdict() for check in checks], indent=1))
    else:
        for check in checks:
            typer.echo(
                f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}"
                + (f"\n      {check.hint}" if check.hint else "")
            )
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@app.callback(invoke_without_command=True)
def options(show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show_version:
        from trainer_node.rpc import hafs_version

        typer.echo(f"hafs-node {hafs_version()}")
        raise typer.Exit
