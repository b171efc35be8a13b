"""What `hafs train` shows: jobs of several nodes, metrics, files, and one job on a screen of 80 columns or more."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from campaigns.cli import render
from campaigns.cli.render import as_json, command, console, duration, job_end, line, note, size, table, when
from campaigns.locate import JobAt, jobs_at
from campaigns.sync.survey import NodeState
from config.contracts.gpu import GpuReading
from config.contracts.job import JobState, JobView, Metrics
from config.contracts.wire import GpuResult
from config.errors import NodeUnreachable

if TYPE_CHECKING:
    from campaigns.results import Results
    from campaigns.watching import JobPicture

WIDE = 120  # columns from which a table says when
ENDED_SHOWN = 5  # ended jobs beside those that go on
ENDLESS = 100_000  # columns
BARS = "▁▂▃▄▅▆▇█"


def surveyed(states: Sequence[NodeState], node: str) -> Sequence[NodeState]:
    """The states of the nodes, and on stderr what is wrong with those that cannot be asked. `node`: the one that was named.

    Raises:
        NodeError: the one node that was named refuses, beyond not answering.
    """
    for state in states:
        if state.problem and node and not isinstance(state.problem, NodeUnreachable):
            raise state.problem
        if state.problem:
            note(f"{state.name}: {since(state.seen.at)}: {state.problem}")
            if state.problem.hint and not isinstance(state.problem, NodeUnreachable):
                note(f"  {state.problem.hint}")
    return states


def since(at: float) -> str:
    """unknown since 12:04; with the day where it was not today."""
    if not at:
        return "unknown, it never answered"
    day = "" if time.strftime("%x") == time.strftime("%x", time.localtime(at)) else "%Y-%m-%d "
    return f"unknown since {time.strftime(f'{day}%H:%M', time.localtime(at))}"


# jobs ------------------------------------------------------------------------------------------------------------------


def submitted(at: JobAt, json_wanted: bool) -> None:
    if json_wanted:
        return as_json(job_facts(at))
    line(f"follow it with: {command('train', 'logs', at.job.id, '-f', node=at.node)}")


def going_on(states: Sequence[NodeState], json_wanted: bool) -> None:
    """What has not ended, and the newest of what has; in JSON all."""
    found = jobs_at(states)
    if json_wanted:
        return jobs(found, True)
    ended = [at for at in found if at.job.state.ended]
    jobs([at for at in found if not at.job.state.ended] + ended[:ENDED_SHOWN], False)
    if len(ended) > ENDED_SHOWN:
        line(f"and {len(ended) - ENDED_SHOWN} older ones: {command('train', 'list')}")


def jobs(found: Sequence[JobAt], json_wanted: bool) -> None:
    if json_wanted:
        return as_json([job_facts(at) for at in found])
    if not found:
        return line("no jobs yet: hafs train submit FILE")
    wide = console.width >= WIDE
    made = table("job", "node", "model", "state", *(["created"] if wide else []), "detail")
    for column in made.columns[1:3]:
        column.max_width = 40 if wide else 18
    for at in found:
        job = at.job
        created = [Text(when(job.created_at))] if wide else []
        row: list[RenderableType] = [Text(job.id), Text(at.node), Text(job.name), Text(job.state), *created, Text(detail(at))]
        made.add_row(*row)
    console.print(fitted(made), soft_wrap=False)


def fitted(made: Table) -> Table:
    """A row a line: where that is too wide, the last column alone loses its end. What is to be typed again stays whole."""
    for column in made.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    last = made.columns[-1]
    if console.measure(made, options=console.options.update(width=ENDLESS)).maximum > console.width:
        made.expand, last.ratio = True, 1
    return made


def one_job(at: JobAt, json_wanted: bool) -> None:
    if json_wanted:
        return as_json(job_facts(at))
    if at.unknown_since is not None:
        line(f"{at.node}: {since(at.unknown_since)}; what it said last:")
    job_end(at.job)
    job = at.job
    order = [f"priority {job.priority}"] if job.priority else []
    order += [f"after {job.after}"] if job.after else []
    attempt = [f"attempt {job.attempt}"] if job.attempt else []
    line("  " + ", ".join([f"on {at.node}", f"created {when(job.created_at)}", *attempt, *order]))


def cancelled(at: JobAt, json_wanted: bool) -> None:
    """A job after it was told to stop, which may take it a while."""
    one_job(at, json_wanted)
    if not json_wanted and at.job.state.active:
        line("  it is stopping, and keeps its last checkpoint")


def retried(at: JobAt, json_wanted: bool) -> None:
    """A job after it was to be tried again."""
    one_job(at, json_wanted)
    if not json_wanted and at.job.state is JobState.SUCCEEDED:
        line("  there is nothing to try again; for another run of it: hafs train submit")


def detail(at: JobAt) -> str:
    """One line on a job beyond its state. What has ended is known, though its node does not answer now."""
    said = at.job.error.message if at.job.error else at.job.detail
    if at.job.result:
        said = said or f"registered {at.job.result.model}"
    said = render.printable(said).replace("\n", " ")
    unknown = at.unknown_since is not None and not at.job.state.ended
    return f"{since(at.unknown_since or 0)}; {said}".removesuffix("; ") if unknown else said


def job_facts(at: JobAt) -> dict[str, Any]:
    """`unknown_since`: Unix seconds; null where the node answered just now."""
    return {**at.job.model_dump(mode="json"), "node": at.node, "unknown_since": at.unknown_since}


# logs, metrics, files --------------------------------------------------------------------------------------------------


def log(data: bytes) -> None:
    """A piece of a log: for a terminal without what a terminal would obey, else byte for byte."""
    if console.is_terminal:
        return render.raw(data.decode(errors="replace"))
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def metrics(found: Sequence[Metrics], json_wanted: bool) -> None:
    if json_wanted:
        for each in found:
            sys.stdout.write(each.model_dump_json() + "\n")
        sys.stdout.flush()  # what cannot be written is an error of this command's
        return
    if not found:
        return line("no metrics yet")
    extra = sorted({name for each in found for name in each.extra})
    made = table(">step", ">epoch", ">loss", ">lr", ">tokens/s", ">memory", *(f">{name}" for name in extra))
    for each in found:
        figures = [f"{each.step}/{each.steps}", f"{each.epoch:.2f}", number(each.loss), number(each.lr, ".2e")]
        memory = "" if each.memory_mb is None else size(each.memory_mb * 1e6)
        made.add_row(*figures, number(each.tokens_per_s, ",.0f"), memory, *(number(each.extra.get(name)) for name in extra))
    console.print(made, soft_wrap=False)


def artifacts(results: "Results", json_wanted: bool) -> None:
    found = results.found
    if json_wanted:
        return as_json({"node": results.node, **found.model_dump(mode="json")})
    line(f"{found.tag} on {results.node}")
    made = table("file", ">size", "sha256")
    for artifact in found.files:
        made.add_row(artifact.name, size(artifact.bytes), artifact.sha256[:12])
    console.print(made, soft_wrap=False)


def fetched(results: "Results", folder: Path, json_wanted: bool) -> None:
    if json_wanted:
        return as_json({"node": results.node, "tag": results.found.tag, "folder": str(folder)})
    line(f"{results.found.tag}: {folder}")


# one job on a screen ---------------------------------------------------------------------------------------------------


def job_screen(seen: "JobPicture", now: float) -> Group:
    """A job as it goes. `now`: Unix seconds; the time to go runs on between two lines of metrics."""
    job, width = seen.job, min(console.width, 200)
    away = f"   {seen.unknown}; the job may well go on" if seen.unknown else ""
    head = f"{job.name}  {job.id} on {seen.node}: {job.state}{away}"
    parts: list[RenderableType] = [_line(head, "bold")]
    if job.detail:
        parts.append(_line(job.detail))
    if seen.metrics:
        parts += [Text(), *_progress(seen.metrics, now, width), *_losses(seen.metrics, width)]
    parts += [Text(), _line(f"gpu    {gpu(seen.gpu)}"), _line(f"queue  {_queue(seen.queue, job)}")]
    return Group(*parts)


def job_progress(seen: "JobPicture") -> str:
    """The same as one line, where there is no terminal."""
    words = [f"{seen.job.id} on {seen.node}: {seen.job.state}"]
    if seen.metrics:
        last = seen.metrics[-1]
        words.append(f"step {last.step} of {last.steps}, loss {number(last.loss)}, {duration(last.eta_s)} to go")
    elif seen.job.detail:
        words.append(seen.job.detail)
    return ", ".join([*words, *([str(seen.unknown)] if seen.unknown else [])])


def gpu(found: GpuResult) -> str:
    """A GPU in one line."""
    reading = found.reading
    if reading is None:
        return f"none seen ({found.missing})" if found.missing else "unknown"
    if reading.source == "queue":
        return f"leased to {reading.leased_to}; its load is not known ({found.missing})"
    memory = f"{size(reading.memory_used_bytes)} of {size(reading.memory_total_bytes)}"
    words = [f"{reading.utilization:.0f} %{_shares(reading)}", memory]
    words += [f"most held by {reading.holder}"] if reading.holder else []
    words += [f"leased to {reading.leased_to}"] if reading.leased_to else []
    return ", ".join(words)


def number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _shares(reading: GpuReading) -> str:
    if reading.own_share is None:
        return ""
    return f" (training {reading.training_share or 0:.0f}, model server {reading.own_share:.0f})"


def _progress(found: Sequence[Metrics], now: float, width: int) -> list[RenderableType]:
    last = found[-1]
    share = min(1.0, last.step / last.steps) if last.steps else 0.0
    left = None if last.eta_s is None else max(0.0, last.eta_s - (now - last.time))
    words = f"{100 * share:3.0f} %  step {last.step} of {last.steps}, epoch {last.epoch:.2f}, {duration(left)} to go"
    bar = max(10, min(60, width - len(words) - 9))
    full = round(bar * share)
    blocks = ("█", "░") if _unicode() else ("#", ".")
    speed = f", {last.tokens_per_s:,.0f} tokens/s" if last.tokens_per_s is not None and width >= WIDE else ""
    return [_line(f"steps  {blocks[0] * full}{blocks[1] * (bar - full)}  {words}{speed}")]


def _losses(found: Sequence[Metrics], width: int) -> list[RenderableType]:
    losses = [each.loss for each in found if each.loss is not None]
    if not losses:
        return []
    figures = f"{losses[-1]:.4f}, lowest {min(losses):.4f}, first {losses[0]:.4f}"
    return [_line(f"loss   {figures}"), _line(f"       {sparkline(losses, width - 8)}")]


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as bars, means of as many as fall on one; the highest value is the highest bar."""
    count = min(width, len(values))
    means = []
    for column in range(count):
        part = values[column * len(values) // count : (column + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    bars = BARS if _unicode() else " .:-=+*#"
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] for mean in means)


def _queue(queue: Sequence[JobView], job: JobView) -> str:
    waiting = [view for view in queue if not view.state.active]
    ids = [view.id for view in waiting]
    if job.id in ids:
        before = len(queue) - len(waiting) + ids.index(job.id)
        return f"{before} before it, {len(ids) - ids.index(job.id) - 1} after it"
    return f"{len(ids)} waiting: {', '.join(ids[:3])}{', …' if len(ids) > 3 else ''}" if ids else "nobody waits"


def _unicode() -> bool:
    return console.encoding.lower().startswith("utf")


def _line(words: str, style: str = "") -> Text:
    return Text(render.printable(words), style=style, no_wrap=True, overflow="ellipsis")
