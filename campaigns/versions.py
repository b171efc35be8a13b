"""What is done with registered versions, from the laptop: promote, roll back, make another form, lay two side by side.

What a loop has measured of a version is kept under the job that made it (`loops/LOOP/benchmarks/JOB.json`): a tag can come again.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, get_args

from pydantic import Field, TypeAdapter, ValidationError

from campaigns.evaluation.report import BASE, TUNED, Evaluation, Row, rows
from campaigns.evaluation.statistics import Interval, wilson
from campaigns.serving import SERVER_S
from campaigns.sync.remote import Node
from config.contracts.base import Tolerant
from config.contracts.job import JobView, PairScores, Quantization
from config.contracts.wire import (
    EXPORT,
    LINEAGE,
    MODELS,
    PROMOTE,
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
from config.files import write_atomic
from config.settings import Settings

EXPORT_WAIT_S = 2.0
EXPORT_S = 90.0  # beyond the wait: a process has to start

OnProgress = Callable[[str, int, int], None]  # what is done now, bytes done and in all


class Figure(NamedTuple):
    """A line of a comparison."""

    name: str
    first: str
    second: str


class Benchmark(Tolerant):
    """What a version answered rightly of a held-out set."""

    tag: str
    job: str
    domain: str
    questions: str  # the set's name
    right: int = Field(ge=0)
    total: int = Field(gt=0)


BENCHMARKS = TypeAdapter(list[Benchmark])


def objection(evaluations: Iterable[Evaluation]) -> str:
    """Why a tuned model should not take its base's place; "" where it beats it on a set and is worse on none.

    As in the report, it beats the base or is worse only where the whole 95 % interval of the paired difference says so.
    """
    gains = {f"{domain}, {questions}": row.gain for domain, questions, row in _rows(evaluations, BASE) if row.gain}
    if worse := [name for name, gain in gains.items() if gain.high < 0]:
        return f"it is worse than its base on {' and '.join(worse)}"
    return "" if any(gain.low > 0 for gain in gains.values()) else "no improvement over its base is shown"


def promote(node: Node, model: str) -> ModelsChanged:
    """Let the aliases name this version. Raises ConfigError for what is no name, JobNotFound, JobFailed."""
    return node.call(PROMOTE, ModelArgs.typed(model), SERVER_S)


def keep_benchmarks(settings: Settings, loop: str, job: JobView, evaluations: Sequence[Evaluation]) -> None:
    """Note what the version of `job` answered."""
    found = [
        Benchmark(tag=evaluation.tuned, job=job.id, domain=domain, questions=questions, right=row.right, total=row.total)
        for evaluation in evaluations
        for domain, questions, row in _rows([evaluation], TUNED)
    ]
    write_atomic(settings.loops / loop / "benchmarks" / f"{job.id}.json", BENCHMARKS.dump_json(found, indent=1))


def benchmarks(settings: Settings, version: Ancestor) -> list[Benchmark]:
    """What the loops of this machine have measured of a version; a file that cannot be read tells nothing."""
    found: list[Benchmark] = []
    for path in sorted(settings.loops.glob(f"*/benchmarks/{version.version.job}.json")):
        try:
            found += BENCHMARKS.validate_json(path.read_bytes())
        except ValidationError:
            continue
    return [each for each in found if each.tag == version.version.tag]


def _rows(evaluations: Iterable[Evaluation], contender: str) -> list[tuple[str, str, Row]]:
    """Domain, set and figures of one contender."""
    sets = [(each.domain, result) for each in evaluations for result in each.sets]
    return [(domain, result.name, row) for domain, result in sets for row in rows(result) if row.contender == contender]


def rollback(node: Node, model: str) -> ModelsChanged:
    """Let the aliases of `model` go back to the version before the one that they name now.

    The node is told which version that is, so that a request that is asked twice takes back only one.

    Raises:
        ConfigError: that can be no model's name.
        JobNotFound: no such model, or no version before it.
    """
    args = RollbackArgs.typed(model)
    alias = model.casefold() if ":" in model else f"{model.casefold()}:latest"
    found = node.call(MODELS, Nothing(), SERVER_S).models
    names = [version.tag for version in found if alias in (version.tag, version.alias, *version.aliases)]
    return node.call(ROLLBACK, args.model_copy(update={"leave": names[0] if names else ""}), SERVER_S)


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
    same = args.model_copy(update={"model": state.tag, "start": False, "wait_s": EXPORT_WAIT_S})  # an alias may move meanwhile
    while state.state == "running":  # the node waits, not this loop
        on_progress(state.step, state.done, state.total)
        state = node.call(EXPORT, same, EXPORT_S)
    if state.error is not None:
        raise error_named(state.error.code)(f"{node.name}: {state.error.message}", hint=state.error.hint)
    return state


def version(node: Node, model: str) -> Ancestor:
    """All that the node knows of one version. Raises ConfigError for what is no name, JobNotFound."""
    chain = node.call(LINEAGE, ModelArgs.typed(model), SERVER_S).chain
    if not chain:
        raise JobNotFound(f"{node.name} has no model {model!r}", hint="hafs models list shows them")
    return chain[0]


def compared(
    first: Ancestor, second: Ancestor, measured: tuple[Sequence[Benchmark], Sequence[Benchmark]] = ((), ())
) -> list[Figure]:
    """The figures of two versions side by side; shares with their 95 % intervals.

    Args:
        measured: the benchmarks of the first and of the second.
    """
    both = [_figures(version) | _answered(found) for version, found in zip((first, second), measured, strict=True)]
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


def _answered(found: Iterable[Benchmark]) -> dict[str, str]:
    told = {}
    for each in found:
        told[f"{each.domain}, {each.questions}"] = f"{each.right}/{each.total}, {_percent(wilson(each.right, each.total))}"
    return told


def _share(share: float, pairs: PairScores) -> str:
    return _percent(wilson(round(share * pairs.pairs), pairs.pairs))


def _percent(share: Interval) -> str:
    return f"{100 * share.estimate:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"
