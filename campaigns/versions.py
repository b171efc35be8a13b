"""What is done with registered versions, from the laptop: roll back, make another form, lay two side by side."""

from collections.abc import Callable
from typing import NamedTuple, get_args

from pydantic import ValidationError

from campaigns.evaluation.statistics import wilson
from campaigns.serving import SERVER_S
from campaigns.sync.remote import Node
from config.contracts.job import PairScores, Quantization
from config.contracts.wire import (
    EXPORT,
    LINEAGE,
    MODELS,
    ROLLBACK,
    Ancestor,
    ExportArgs,
    ExportState,
    ModelArgs,
    ModelsChanged,
    Nothing,
    RollbackArgs,
)
from config.errors import ConfigError, JobNotFound, error_named

EXPORT_WAIT_S = 2.0
EXPORT_S = 90.0  # beyond the wait: a process has to start

OnProgress = Callable[[str, int, int], None]  # what is done now, bytes done and in all


class Figure(NamedTuple):
    """A line of a comparison."""

    name: str
    first: str
    second: str


def rollback(node: Node, model: str) -> ModelsChanged:
    """Let the aliases of `model` go back to the version before the one that they name now.

    The node is told which version that is, so that a request that is asked twice takes back only one.

    Raises:
        JobNotFound: no such model, or no version before it.
    """
    alias = model if ":" in model else f"{model}:latest"
    found = node.call(MODELS, Nothing(), SERVER_S).models
    names = [version.tag for version in found if alias in (version.tag, version.alias, *version.aliases)]
    return node.call(ROLLBACK, RollbackArgs(model=model, leave=names[0] if names else ""), SERVER_S)


def export_args(model: str, route: str, quantize: str) -> ExportArgs:
    """Raises ConfigError for what cannot be asked for."""
    if quantize and route != "merged":
        raise ConfigError(f"--quantize does not go with --route {route}", hint="quantize a merged GGUF: --route merged")
    try:
        return ExportArgs.model_validate({"model": model, "route": route, "quantize": quantize})
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        known = {"route": "merged, adapter, hf", "quantize": ", ".join(get_args(Quantization))}.get(wrong, "NAME or NAME:TAG")
        raise ConfigError(f"{wrong}: {error.errors()[0]['input']!r} is none", hint=f"one of these: {known}") from error


def export(node: Node, args: ExportArgs, on_progress: OnProgress) -> ExportState:
    """Make another form of a version on the node and wait for its end. Cut off, it goes on there; asked again, this follows it.

    Raises:
        JobNotFound: no such model.
        HafsError: the class that the node names.
    """
    state = node.call(EXPORT, args.model_copy(update={"wait_s": EXPORT_WAIT_S}), EXPORT_S)
    while state.state == "running":  # the node waits, not this loop
        on_progress(state.step, state.done, state.total)
        state = node.call(EXPORT, args.model_copy(update={"start": False, "wait_s": EXPORT_WAIT_S}), EXPORT_S)
    if state.error is not None:
        raise error_named(state.error.code)(f"{node.name}: {state.error.message}", hint=state.error.hint)
    return state


def version(node: Node, model: str) -> Ancestor:
    """All that the node knows of one version. Raises JobNotFound."""
    chain = node.call(LINEAGE, ModelArgs(model=model), SERVER_S).chain
    if not chain:
        raise JobNotFound(f"{node.name} has no model {model!r}", hint="hafs models list shows them")
    return chain[0]


def compared(first: Ancestor, second: Ancestor) -> list[Figure]:
    """The figures of two versions side by side; shares with their 95 % intervals."""
    both = [_figures(first), _figures(second)]
    return [Figure(name, *(each.get(name, "") for each in both)) for name in {**both[0], **both[1]}]


def _figures(found: Ancestor) -> dict[str, str]:
    made, told = found.version, found.statistics
    figures = {
        "kind": made.kind,
        "base": made.base,
        "goes on from": found.start,
        "served as": f"{made.route} {made.quantized}".strip(),
        "dataset": made.dataset_id[:12],
        "rows": str(found.manifest.rows) if found.manifest else "",
    }
    if found.perplexity:
        figures |= {
            "held-out perplexity": f"{found.perplexity.tuned:.3f}",
            "of the base": f"{found.perplexity.base:.3f}",
            "held-out rows": str(found.perplexity.rows),
        }
    if found.pairs:
        figures |= {
            "reward accuracy": _share(found.pairs.reward_accuracy, found.pairs),
            "chosen likelier": _share(found.pairs.chosen_likelier, found.pairs),
            "reward margin": f"{found.pairs.reward_margin:.3f}",
        }
    figures |= {name.replace("_", " "): f"{told[name]:.6g}" for name in ("steps", "train_s", "last_loss") if name in told}
    return {name: value for name, value in figures.items() if value}


def _share(share: float, pairs: PairScores) -> str:
    interval = wilson(round(share * pairs.pairs), pairs.pairs)
    return f"{100 * share:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
