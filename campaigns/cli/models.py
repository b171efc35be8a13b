"""`hafs models`: what the nodes have registered, and which version the aliases name. `hafs lineage`: where one comes from."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # loads what reaches nodes
    from campaigns.sync.remote import Node
    from config.contracts.wire import ModelsChanged, Verb

app = typer.Typer(help="The models you made.", no_args_is_help=True)

OnNode = Annotated[str, typer.Option("--node", help="A node of nodes.toml; local is this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Argument(help="A tag (hafs-coder:14b-v7, or hafs-coder:v7), an alias or a name.")]
Samples = Annotated[bool, typer.Option("--samples/--no-samples", help="The id of every sample, a line each.")]


@app.command("list")
def list_(node: OnNode = "local", as_json: Json = False) -> None:
    """Versions of your models on a node, newest last."""
    from campaigns.cli import render_models
    from config.contracts.wire import MODELS, Nothing

    with _connect(node) as remote:
        render_models.models(remote.call(MODELS, Nothing()), as_json)


@app.command()
def show(model: Model, node: OnNode = "local", as_json: Json = False) -> None:
    """One version: its figures, its job, its base and how it is served."""
    from campaigns.cli import render_models
    from campaigns.versions import version

    with _connect(node) as remote:
        render_models.version(version(remote, model), as_json)


@app.command()
def lineage(model: Model, samples: Samples = True, node: OnNode = "local", as_json: Json = False) -> None:
    """The way back of a version to its job, base, data, campaigns, prompts, the models that wrote them, and their cost."""
    from campaigns.cli import render_models
    from campaigns.lineage import lineage as trace
    from config.settings import load_settings

    with _connect(node) as remote:
        render_models.lineage(trace(load_settings(), remote, model), samples, as_json)


@app.command()
def compare(first: Model, second: Model, node: OnNode = "local", as_json: Json = False) -> None:
    """Two versions side by side, with what `hafs run` on this machine has measured of them."""
    from campaigns.cli import render_models
    from campaigns.versions import benchmarks, compared, version
    from config.settings import load_settings

    with _connect(node) as remote:
        a, b = version(remote, first), version(remote, second)
    settings = load_settings()
    figures = compared(a, b, (benchmarks(settings, a), benchmarks(settings, b)))
    render_models.compared(a.version.tag, b.version.tag, figures, as_json)


@app.command()
def promote(model: Model, node: OnNode = "local", as_json: Json = False) -> None:
    """Let the aliases (hafs-coder:14b, hafs-coder:latest) name this version."""
    from config.contracts.wire import PROMOTE, ModelArgs

    _change(node, PROMOTE, ModelArgs.typed(model), as_json)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="A name, or one of its aliases.")] = "hafs-coder",
    node: OnNode = "local",
    as_json: Json = False,
) -> None:
    """Let the aliases name the version that they named before; again, the one before that."""
    from campaigns.cli import render_models
    from campaigns.versions import rollback as roll_back

    with _connect(node) as remote:
        render_models.changed(roll_back(remote, name), as_json)


@app.command()
def delete(
    tag: Annotated[str, typer.Argument(help="A version: hafs-coder:14b-v7, or hafs-coder:v7.")],
    node: OnNode = "local",
    as_json: Json = False,
) -> None:
    """Remove a version from the model server, the registry and the node's disk."""
    from config.contracts.wire import DELETE, ModelArgs

    _change(node, DELETE, ModelArgs.typed(tag), as_json)


@app.command()
def prune(
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="So many of the newest of each name stay, and so many that did not pass.")
    ],
    name: Annotated[str, typer.Argument(help="Of this name alone.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    node: OnNode = "local",
    as_json: Json = False,
) -> None:
    """Delete old versions; what an alias names, what is loaded and what a job needs stays."""
    from config.contracts.wire import PRUNE, ModelArgs, PruneArgs

    of = ModelArgs.typed(name).model if name else ""
    _change(node, PRUNE, PruneArgs(keep=keep, name=of, dry_run=dry_run), as_json, dry_run=dry_run)


@app.command()
def export(
    model: Model,
    route: Annotated[
        str, typer.Option(help="merged (one GGUF), adapter (a GGUF beside its base), hf (transformers, vLLM).")
    ] = "merged",
    quantize: Annotated[str, typer.Option(help="Of a merged GGUF: F16 (the default), Q8_0, Q4_K_M, …")] = "",
    node: OnNode = "local",
    as_json: Json = False,
) -> None:
    """Make another form of a version on its node; `hafs sync pull` fetches it. Interrupted, it goes on there: run it again."""
    from campaigns.cli import render_models
    from campaigns.versions import export as make
    from campaigns.versions import export_args

    args = export_args(model, route, quantize)
    with _connect(node) as remote, render_models.making() as on_progress:
        state = make(remote, args, on_progress)
    render_models.exported(state, node, as_json)


def _connect(node: str) -> "Node":
    from campaigns.sync.remote import connect
    from config.settings import load_settings

    return connect(load_settings(), node)


def _change(node: str, verb: "Verb[Any, ModelsChanged]", args: Any, as_json: bool, *, dry_run: bool = False) -> None:
    from campaigns.cli import render_models
    from campaigns.serving import SERVER_S

    with _connect(node) as remote:
        render_models.changed(remote.call(verb, args, SERVER_S), as_json, dry_run=dry_run)
