"""What `hafs models` and `hafs lineage` print."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from campaigns.cli import render
from campaigns.lineage import Campaign, Step, Writer, facts
from campaigns.versions import Figure
from config.contracts.wire import Ancestor, ExportState, ModelsChanged, ModelsResult, ModelVersion


def models(found: ModelsResult, json_wanted: bool) -> None:
    if json_wanted:
        return render.as_json([each.model_dump(mode="json") for each in (*found.models, *found.failed)])
    if not found.models and not found.failed:
        return render.line("no models yet: hafs train submit FILE")
    made = render.table("model", "alias", "kind", "served as", "job", "made", ">perplexity", "dataset")
    for each in found.models:
        before, after = each.perplexity_base, each.perplexity_tuned
        figures = f"{before:.2f} -> {after:.2f}" if before is not None and after is not None else ""
        served = f"{each.route} {each.quantized}".strip()
        row = (each.tag, _aliases(each), each.kind, served, each.job, render.when(each.created_at), figures, each.dataset_id[:12])
        made.add_row(*map(escape, row))
    if found.models:
        render.console.print(made)
    for each in found.models:
        if each.note:
            render.line(f"{each.tag}: {each.note}")
    for each in found.failed:
        render.line(f"kept for inspection: {each.fault}")
    if not found.checked:
        render.note("no model server answers: the aliases are those that were set last")


def version(found: Ancestor, json_wanted: bool) -> None:
    if json_wanted:
        return render.as_json(found.model_dump(mode="json", exclude={"segments"}))
    render.heading(found.version.tag)
    for name, value in _facts(found):
        if value:
            render.line(f"  {name:<12} {value}")


def lineage(steps: Sequence[Step], samples: bool, json_wanted: bool) -> None:
    """The way back, the newest version first; every sample's id with `samples`."""
    if json_wanted:
        return render.as_json(facts(steps))
    for step in steps:
        version(step.version, False)
        _data(step)
        for campaign in step.campaigns:
            _campaign(campaign)
        for text in step.missing:
            render.line(f"  missing      {text}")
        render.line(f"  samples      {len(step.samples)}")
        for origin in step.samples if samples else ():
            render.line(f"    {origin.id}  {origin.campaign}  {origin.provider} {origin.model}  {origin.source_id}")


def compared(first: str, second: str, figures: Sequence[Figure], json_wanted: bool) -> None:
    if json_wanted:
        return render.as_json(
            {first: {each.name: each.first for each in figures}, second: {each.name: each.second for each in figures}}
        )
    made = render.table("", escape(first), escape(second))
    for each in figures:
        made.add_row(*map(escape, each))
    render.console.print(made)


def changed(result: ModelsChanged, json_wanted: bool, *, dry_run: bool = False) -> None:
    if json_wanted:
        return render.as_json(result.model_dump(mode="json"))
    for each in result.models:
        render.line(f"{each.tag} is {_aliases(each)}" if each.aliases else f"{each.tag} carries no alias")
    for tag in result.removed:
        render.line(f"{tag} would go" if dry_run else f"{tag} is gone")
    for note in result.notes:
        render.line(note)
    if not (result.models or result.removed or result.notes):
        render.line("nothing to delete")


def exported(state: ExportState, node: str, json_wanted: bool) -> None:
    if json_wanted:
        return render.as_json(state.model_dump(mode="json"))
    by = f", made by {state.quantizer}" if state.quantizer else ""
    what = f", weights in {state.quantized}{by}" if state.quantized else ""
    render.line(f"{state.tag} on {node}: {', '.join(state.files)}{what}")
    if state.note:
        render.line(f"note: {state.note}")
    render.line(f"fetch it: {render.command('sync', 'pull', state.tag, node=node)}")


@contextmanager
def making() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, silent elsewhere; the function it gives takes what is done now, bytes done and bytes in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=render.console, transient=True, disable=not render.on_screen()) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total or None)


def _aliases(each: ModelVersion) -> str:
    return " and ".join(each.aliases or ([each.alias] if each.alias else []))


def _facts(found: Ancestor) -> Iterator[tuple[str, str]]:
    made = found.version
    yield "aliases", _aliases(made)
    yield "fault", made.fault
    yield "note", made.note
    by = f" by {found.quantizer}" if found.quantizer else ""
    yield "served as", f"{made.route} {made.quantized}".strip() + by
    yield "job", f"{made.job} ({made.kind}), {render.when(made.created_at)}, hafs {found.code or '?'}"
    yield "base", f"{made.base} (SHA-256 {found.base_sha256})"
    yield "goes on from", found.start
    yield "adapter", f"SHA-256 {found.adapter_sha256}"
    train = found.spec.get("train", {})
    yield "trained", ", ".join(f"{name} {train[name]}" for name in ("epochs", "lr", "batch", "seed") if name in train)
    if found.perplexity:
        told = found.perplexity
        yield "held out", f"perplexity {told.base:.2f} -> {told.tuned:.2f} ({told.rows} rows, {told.tokens} tokens)"
    if found.pairs:
        yield "pairs", f"{found.pairs.pairs} held out, reward accuracy {render.percent(found.pairs.reward_accuracy)}"
    if found.manifest:
        manifest = found.manifest
        yield "dataset", f"{made.dataset_id} ({manifest.kind}, {manifest.rows} rows)"
        yield "segments", ", ".join(segment.sha256[:12] for segment in manifest.segments)
        yield "campaigns", ", ".join(manifest.campaigns)
    else:
        yield "dataset", made.dataset_id


def _data(step: Step) -> None:
    for writer in step.writers:
        render.line(f"  written by   {_writer(writer)}")
    if len(step.writers) > 1:
        render.line(f"  cost         {_usd(sum(writer.cost_usd for writer in step.writers))} for the rows of this dataset")


def _writer(writer: Writer) -> str:
    tokens = writer.prompt_tokens + writer.completion_tokens
    who = f"{writer.provider} {writer.model}".strip() or "nobody it names"
    what = f"{writer.rows} rows of {writer.campaign} ({writer.domain}) from {len(writer.prompts)} prompts"
    return f"{who}: {what}, {tokens} tokens, {_usd(writer.cost_usd)}"


def _campaign(found: Campaign) -> None:
    verdicts = f"{found.accepted} accepted, {found.rejected} rejected, {found.failed} failed"
    render.line(f"  campaign     {found.name}: {verdicts}; {_usd(found.cost_usd)} for all calls")
    if found.reasons:
        render.line(
            f"               not accepted for: {', '.join(f'{reason} {count}' for reason, count in found.reasons.items())}"
        )
    for template in found.templates:
        what = f"template {template.domain} {template.version}, system message SHA-256 {template.system_sha256[:12]}"
        render.line(f"               {what}: {template.system}")


def _usd(cost: float) -> str:
    return f"${cost:.4f}"
