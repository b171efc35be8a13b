"""What `hafs nodes` shows."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.markup import escape

from campaigns.cli import render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from campaigns.nodes import NodeState
    from campaigns.sync.setup import Progress
    from config.contracts.wire import DoctorCheck


def states(found: "Sequence[NodeState]", json_wanted: bool) -> None:
    """A row a node; what is wrong with one stands below the table."""
    if json_wanted:
        return render.as_json([asdict(state) for state in found])
    made = render.table("node", "where", "state", "hafs", "daemon", ">running", ">waiting")
    for state in found:
        name, where, hafs = (escape(render.printable(text)) for text in (state.name, state.where, state.hafs))
        if state.problem:
            made.add_row(name, where, "does not answer", "", "", "", "")
        else:
            daemon = "running" if state.daemon else "on demand"
            made.add_row(name, where, "ok", hafs, daemon, str(state.running), str(state.waiting))
    render.console.print(made)
    for state in found:
        if state.problem:
            render.line(state.problem if state.problem.startswith(state.name) else f"{state.name}: {state.problem}")
        elif state.other_version:
            render.line(f"{state.name} has another hafs than this machine: {render.command('nodes', 'upgrade', state.name)}")


def checks(found: "Sequence[DoctorCheck]", json_wanted: bool) -> None:
    """One line each: ok or FAIL, and below it what to do."""
    if json_wanted:
        return render.as_json([check.model_dump() for check in found])
    for check in found:
        hint = f"\n      {check.hint}" if check.hint else ""
        render.line(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}{hint}")


@contextmanager
def setting_up(name: str) -> "Iterator[Progress]":
    """A line a step as it is done; what takes long is said on the last line of a terminal."""
    from campaigns.sync.setup import Progress

    def step(text: str) -> None:
        render.line(f"  {text}")

    if not render.on_screen():
        yield Progress(step=step, working=lambda text: None)
        return
    with render.console.status(escape(f"setting up {name}")) as status:
        yield Progress(step=step, working=lambda text: status.update(escape(render.printable(text)[:100])))
