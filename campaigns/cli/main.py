"""`hafs`: what runs on the laptop. Commands parse, call one function and render; errors become exit codes here, once.

Nothing heavy is imported at the top of this package: `hafs --help` answers in 0.3 s.
"""

import atexit
import gc
import logging
import sys
from typing import Annotated

import typer

from campaigns.cli import campaign, chat, data, loop, models, nodes, serve, setup, sync, train
from config import standard_output
from config.errors import HafsError, MissingExtra, StoreError

app = typer.Typer(
    name="hafs",
    help="Make a coding model of your own: generate data, ship it, train on your GPU box, chat with the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("init")(setup.init)
app.command("doctor")(setup.doctor)
app.command("run")(loop.run)
app.command("status")(loop.status)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("lineage")(models.lineage)
app.add_typer(campaign.app, name="campaign")
app.add_typer(data.app, name="data")
app.add_typer(sync.app, name="sync")
app.add_typer(train.app, name="train")
app.add_typer(models.app, name="models")
app.add_typer(nodes.app, name="nodes")

EXTRAS = {
    "aiohttp",
    "anyio",
    "google",
    "httpx",
    "ollama",
    "paramiko",
    "prompt_toolkit",
    "psutil",
    "rich",
    "tenacity",
    "tomlkit",
    "zstandard",
}


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"hafs {installed_version('hafs')}")
        raise typer.Exit()


def main() -> None:
    """The entry point: runs a command and turns what it raises into a message and an exit code. Typer makes Ctrl-C 130."""
    atexit.register(gc.freeze)  # else a last collection goes through all that was loaded: a fifth of a short command's time
    logging.getLogger("hafs").addHandler(logging.NullHandler())  # lines of a log that is not open are not for the terminal
    try:
        standard_output.guard()
        app()
    except HafsError as error:
        fail(error)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS:
            raise
        fail(MissingExtra(f"the package {error.name} is not installed", hint='pip install "hafs[laptop]"'))
    except SystemExit as end:
        if end.code == standard_output.READER_LEFT or not isinstance(end.__context__, BrokenPipeError):
            raise
        # Typer takes every broken pipe for its reader's leaving, and says nothing
        fail(StoreError("what hafs was writing to has ended: broken pipe", hint="run the same command again"))
    except OSError as error:  # a file of the user's that cannot be read: edges that know more have said more
        fail(StoreError(f"{error.filename or 'a file'}: {error.strerror or error}", hint="check that it exists and is yours"))


def fail(error: HafsError) -> None:
    try:
        typer.echo(f"error: {error}", err=True)
        if error.hint:
            typer.echo(f"  {error.hint}", err=True)
    finally:  # also where nobody reads it any more
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
