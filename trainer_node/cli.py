"""`hafs-node`: what runs on the trainer node. An error is one line and a hint on stderr, and an exit code of config.errors."""

import json
from pathlib import Path
from typing import Annotated

import typer

from config.errors import HafsError, MissingExtra
from config.settings import load_settings

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="The trainer node of hafs.")

Root = Annotated[Path | None, typer.Option(help="The node's folder; default: HAFS_HOME/node.")]
IdleExit = Annotated[float | None, typer.Option(min=0, help="Exit after so many idle seconds; default: stay.")]


@app.command()
def daemon(root: Root = None, idle_exit: IdleExit = None) -> None:
    """Run the queued jobs, one at a time."""
    from trainer_node.daemon import Daemon

    Daemon(_root(root), idle_exit_s=idle_exit).serve()


@app.command()
def rpc(root: Root = None) -> None:
    """Serve one connection on stdin and stdout: one line of JSON a request, one a reply."""
    from trainer_node.rpc import serve_stdio

    serve_stdio(_root(root))


@app.command()
def runtime(
    root: Root = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any free one.")] = 0,
    idle_exit: IdleExit = None,
) -> None:
    """Serve the models of this node to Ollama clients, on a machine without Ollama."""
    from trainer_node.runtime.server import serve

    serve(_root(root), port, idle_exit)


@app.command()
def doctor(root: Root = None, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Say what is missing: one line each, ok or what to do. Exit code 1 if anything is."""
    from trainer_node.doctor import examine

    checks = examine(_root(root))
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


def main() -> None:
    """The entry point. Ctrl-C is exit code 130 (typer's own)."""
    try:
        try:
            app()
        except ModuleNotFoundError as error:
            raise MissingExtra(f"the package {error.name} is not installed", hint='pip install "hafs[node]"') from error
    except HafsError as error:
        typer.echo(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""), err=True)
        raise SystemExit(error.exit_code) from error


def _root(root: Path | None) -> Path:
    return (root or load_settings().node_root).expanduser().resolve()


if __name__ == "__main__":
    main()
