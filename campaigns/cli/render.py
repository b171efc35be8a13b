"""All terminal output of `hafs`. Pure functions make lines and tables; `console` prints them."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as TransferBar
from rich.table import Table

from config.contracts.job import JobView
from config.settings import LOCAL

if TYPE_CHECKING:  # they load model servers' clients, which most commands do without
    from campaigns.loop import LoopResult
    from campaigns.sync.push import PushResult
    from campaigns.sync.seal import SealedDataset

console = Console(highlight=False, soft_wrap=True, emoji=False)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PIPED_COLUMNS = 200  # a table that goes to a file or a pipe is not cut to the 80 columns of a terminal that is not there
if not console.is_terminal:
    console.width = PIPED_COLUMNS


def line(text: str = "") -> None:
    """One line as it is: model output and paths are never markup."""
    console.print(printable(text), markup=False)


def raw(text: str) -> None:
    """Text without a newline added: streamed answers, logs."""
    console.print(printable(text), markup=False, end="")


def on_screen() -> bool:
    """Whether what moves can be shown. FORCE_COLOR makes a terminal of a pipe for colours alone."""
    return console.is_terminal and sys.stdout.isatty()


def as_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def command(*words: str, node: str = LOCAL) -> str:
    """A command of hafs as it has to be typed in this shell and folder to mean the same home and node."""
    home = [f"HAFS_HOME={shlex.quote(os.environ['HAFS_HOME'])}"] if os.environ.get("HAFS_HOME") else []
    called = sys.argv[0]
    typed = (
        os.sep in called and os.path.isfile(called) and not called.endswith(".py")
    )  # python -m shows a file that is no command
    found = shutil.which("hafs")
    program = os.path.relpath(called) if typed and not (found and os.path.samefile(found, called)) else "hafs"
    where = [] if node == LOCAL else ["--node", node]
    return " ".join([*home, shlex.join([program, *words, *where])])


def printable(text: str) -> str:
    """Without control characters: a terminal would obey those of a model's answer or a job's log."""
    return CONTROL.sub("", text)


def heading(text: str) -> None:
    console.print(f"\n[bold]{escape(printable(text))}[/bold]")


# figures ---------------------------------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """1:05 for 65 s, 2:03:00 for two hours and three minutes, ? for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(part: float | None) -> str:
    return "?" if part is None else f"{100 * part:.0f} %"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column.startswith(">") else "left")
        made.columns[-1].header = column.lstrip(">")
    return made


# jobs and models -------------------------------------------------------------------------------------------------------


def job_line(job: JobView) -> str:
    detail = f" ({job.detail})" if job.detail else ""
    return f"{job.id}  {job.name}  {job.state}{detail}"


def job_end(job: JobView) -> None:
    """What a person wants to know of a job that has ended."""
    line(job_line(job))
    if job.error:
        line(f"  {job.error.code}: {job.error.message}")
        if job.error.hint:
            line(f"  {job.error.hint}")
    if result := job.result:
        names = result.aliases or ([result.alias] if result.alias else [])
        alias = f", also {' and '.join(names)}" if names else ""
        line(f"  registered {result.model}{alias}; {result.steps} steps in {duration(result.train_s)}")
        if result.perplexity:
            figures = result.perplexity
            line(
                f"  held-out perplexity {figures.base:.2f} -> {figures.tuned:.2f} ({figures.rows} rows, {figures.tokens} tokens)"
            )
        if result.pairs:
            pairs = result.pairs
            line(
                f"  held-out pairs: {pairs.pairs}; reward accuracy against the reference {percent(pairs.reward_accuracy)}; "
                f"chosen likelier {percent(pairs.chosen_likelier_reference)} -> {percent(pairs.chosen_likelier)}"
            )
        if result.note:
            line(f"  {result.note}")


def jobs(views: Sequence[JobView], json_wanted: bool) -> None:
    if json_wanted:
        return as_json([view.model_dump(mode="json") for view in views])
    if not views:
        return line("no jobs yet: hafs train submit FILE")
    made = table("job", "kind", "model", "state", ">attempt", "created", "detail")
    for view in views:
        detail = view.error.message if view.error else view.detail
        made.add_row(
            view.id, view.kind, view.name, view.state, str(view.attempt), when(view.created_at), escape(printable(detail))
        )
    console.print(made)


# data ------------------------------------------------------------------------------------------------------------------


def row(row: dict[str, Any], json_wanted: bool) -> None:
    if json_wanted:
        return typer.echo(json.dumps(row))
    heading(f"{row['domain']}  {row.get('reason') or row.get('change') or 'accepted'}  {row['id'][:12]}")
    for message in row["messages"]:
        line(f"{message['role']:>10}: {message['content']}")
    for key in ("completion", "chosen", "rejected"):
        if key in row:
            line(f"{key:>10}: {row[key]}")


@contextmanager
def transfer(word: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, silent elsewhere; the function it gives takes bytes done and bytes in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with TransferBar(*columns, console=console, transient=True, disable=not on_screen()) as bar:
        task = bar.add_task(word, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counted(word: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, silent elsewhere; the function it gives takes what is done and what has failed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with TransferBar(*columns, console=console, transient=True, disable=not on_screen()) as bar:
        task = bar.add_task(word, total=total)

        def told(done: int, failed: int) -> None:
            bar.update(task, completed=done + failed, description=f"{word}, {failed} failed" if failed else word)

        yield told


def pushed(result: "PushResult", node: str) -> None:
    what = f"dataset {result.dataset_id[:12]}, {result.rows} rows"
    if result.sent_bytes:
        speed = f" in {result.seconds:.1f} s ({size(result.sent_bytes / result.seconds)}/s)" if result.seconds else ""
        return line(f"{node} has {what}: sent {size(result.sent_bytes)}{speed}, {size(result.skipped_bytes)} were there")
    line(f"{node} has {what} already: nothing sent")


def left_out(sealed: "SealedDataset") -> None:
    """What did not become part of a dataset, if anything."""
    if sealed.duplicates:
        line(f"{sealed.duplicates} rows are in it once though they came twice")
    for path in sealed.torn:
        line(f"{path}: its unfinished last line was left out")


def note(text: str) -> None:
    """Something to know that is no result: to stderr, so that an answer can be piped."""
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(printable(text), markup=False, style="dim")


def serving(url: str, model: str, with_key: bool) -> None:
    """Where a model is served, as soon as it is: whoever waits for the line can ask."""
    line(f"{model} answers at {url}/v1{' to those who have the API key' if with_key else ''}; how: {url}/docs; Ctrl-C ends")
    console.file.flush()


# the loop --------------------------------------------------------------------------------------------------------------


def loop_result(result: "LoopResult", chat: str) -> None:
    """The end of `hafs run`: the figures, how long each step took, and what to do next."""
    from campaigns.evaluation.report import terminal

    for evaluation in result.evaluations:
        heading("base against tuned")
        line(terminal(evaluation))
    line("seconds: " + ", ".join(f"{step} {seconds:.0f}" for step, seconds in result.seconds.items()))
    line(f"report:  {result.report}")
    if result.job.result and result.job.result.note:
        line(f"note:    {result.job.result.note}")
    heading("Talk to it")
    line(f"  {chat}")
