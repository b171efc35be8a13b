"""What `hafs campaign check` and `simulate` show. It fits a terminal of 80 columns and uses more where there is more."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from math import floor, inf, log10
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from campaigns.check import Checked
from campaigns.cli.render import as_json, console, duration, heading, note, percent, printable, size, table, transfer
from campaigns.estimate import Estimate
from campaigns.logs import REASONS
from campaigns.outlook import DomainOutlook, LaneOutlook, Probe, Range
from config.errors import ModelMissing, ProviderUnavailable

if TYPE_CHECKING:
    from agents.lanes import LaneEvent
    from campaigns.described import Assumed
    from campaigns.lanes import Missing
    from campaigns.simulate import SimulatedLane, Simulation

BASIS = {"probe": "the probe", "guess": "a guess"}
EVENTS = 12  # shown of a simulation
IDLE_SHOWN = 0.01  # of the time; less is not worth a word
ENDS = {
    "done": "complete",
    "budget": "stopped at the budget",
    "exhausted": "no further calls would help",
    "failed": "failed",
}


# figures ---------------------------------------------------------------------------------------------------------------


def figure(value: float) -> str:
    """Three digits at most, with k and M: 0.25, 12, 820, 12.3k, 1.2M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def money(value: float) -> str:
    """Dollars with as many digits as matter: $1,200.00, $0.40, $0.034, $0.0006."""
    if value >= 0.1 or value == 0:
        return f"${value:,.2f}"
    return f"${value:.{1 - floor(log10(value))}f}"


def span(value: Range, shown: Callable[[float], str] = figure) -> str:
    """low–high, or one of them where both look the same."""
    low, high = shown(value.low), shown(value.high)
    return low if low == high else f"{low}–{high}"


def clock(seconds: float) -> str:
    """Whole minutes and hours for a person: 40 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit in ((2 * 86400, "days"), (2 * 3600, "h"), (120, "min")):
        if seconds >= limit:
            value = seconds / {"days": 86400, "h": 3600, "min": 60}[unit]
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds:.0f} s"


# check -----------------------------------------------------------------------------------------------------------------


def plan(checked: Checked, json_wanted: bool) -> None:
    """What a campaign will take, and what the probes found."""
    if json_wanted:
        return as_json(asdict(checked))
    console.print(plan_view(checked), soft_wrap=False)


def plan_view(checked: Checked) -> Group:
    seen = checked.estimate
    there = f", {seen.accepted} are there" if seen.accepted else ""
    parts: list[RenderableType] = [
        Text(f"{seen.name}: {seen.target} samples wanted{there}", style="bold"),
        Text(),
        _domains(seen.domains),
        Text(),
        _lanes(seen.lanes),
        Text(),
    ]
    if checked.probes:
        parts += [_probes(checked.probes), Text()]
    parts += [_totals(seen), Text(), *(Text(printable(note)) for note in _notes(checked))]
    return Group(*parts)


def exit_code(checked: Checked) -> int:
    """Not 0 where a lane's model is missing, or no lane answered."""
    if any(probe.missing for probe in checked.probes):
        return ModelMissing.exit_code
    if checked.probes and all(probe.error for probe in checked.probes):
        return ProviderUnavailable.exit_code
    return 0


def pulling(lack: "Missing") -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar for a model that is fetched."""
    note(f"fetching {lack.model} to {lack.host}")
    return transfer(lack.model)


def _domains(domains: Iterable[DomainOutlook]) -> Table:
    made = table("domain", ">samples", "facts of", "lanes", "leaves for")
    for outlook in domains:
        files = f"{outlook.files} files" if outlook.files else "the shipped corpus"
        leaves = ", ".join(outlook.leaves_to) or "nobody: stays on your machines"
        made.add_row(
            outlook.name,
            str(outlook.wanted),
            f"{files}, {outlook.cells} forms{', private' if outlook.private else ''}",
            printable(", ".join(outlook.lanes)),
            printable(leaves),
        )
    return _folding(made, 3, 4)


def _lanes(lanes: Iterable[LaneOutlook]) -> Table:
    made = table("lane", ">s a call", ">tokens in", ">out", ">$ per 1k", ">calls/s", "known by")
    for lane in lanes:
        usd = "free" if lane.own else "unknown"
        if lane.usd is not None:
            usd = span(Range(1000 * lane.usd.low, 1000 * lane.usd.high), money)
        basis = f"{lane.past_calls} calls" if lane.basis == "history" else BASIS[lane.basis]
        made.add_row(
            printable(lane.name if lane.name.endswith(lane.model) else f"{lane.name} ({lane.model})"),
            span(lane.latency_s),
            span(lane.prompt_tokens),
            span(lane.completion_tokens),
            usd,
            span(lane.pace),
            basis,
        )
    return _folding(made, 0, 6)


def _probes(probes: Iterable[Probe]) -> Table:
    made = table("probed", ">seconds", ">tokens/s", ">tokens", ">cost", "")
    for probe in probes:
        if probe.error:
            made.add_row(printable(probe.lane), "", "", "", "", printable(probe.error))
            continue
        usage = probe.usage
        tokens = f"{usage.prompt_tokens} + {usage.completion_tokens + usage.thinking_tokens}"
        speed, cost = figure(probe.tokens_per_s), money(probe.cost_usd) if probe.cost_usd else "free"
        made.add_row(printable(probe.lane), f"{probe.latency_s:.2f}", speed, tokens, cost, "answered")
    return _folding(made, 5)


def _totals(seen: Estimate) -> Table:
    made = Table.grid(padding=(0, 2))
    made.add_row("calls", span(seen.calls))
    made.add_row("tokens", f"{span(seen.prompt_tokens)} of prompts, {span(seen.completion_tokens)} of answers")
    made.add_row("time", span(Range(3600 * seen.hours.low, 3600 * seen.hours.high), clock))
    made.add_row("cost", _cost(seen))
    made.add_row("disk", span(seen.disk_bytes, size))
    return made


def _cost(seen: Estimate) -> str:
    parts = [span(seen.cost_usd, money) if any(not lane.own for lane in seen.lanes) else "nothing: every lane is your own"]
    if seen.spent_usd:
        parts.append(f"{money(seen.spent_usd)} were spent before")
    if seen.max_usd is not None:
        parts.append(f"never more than {money(seen.max_usd)} in all")
    left_usd = inf if seen.max_usd is None else seen.max_usd - seen.spent_usd
    if seen.worst_usd is not None and seen.worst_usd < left_usd:
        parts.append(f"{money(seen.worst_usd)} if every call took its worst case")
    return "; ".join(parts)


def _notes(checked: Checked) -> list[str]:
    seen, notes = checked.estimate, []
    if seen.may_end_early:
        notes.append(f"The budget may end it before the target: all of it may cost up to {money(seen.uncapped_usd.high)}.")
    if unknown := [lane.name for lane in seen.lanes if lane.price_unknown]:
        notes.append(f"Not in the cost: {', '.join(unknown)}, whose price nobody knows.")
    if any(probe.missing for probe in checked.probes):
        notes.append("A model is missing; --pull fetches it to an Ollama server.")
    if not checked.probes and any(lane.basis == "guess" for lane in seen.lanes):
        notes.append("A guess is wide on purpose; --probe sends one request to every lane and narrows it.")
    if not checked.probes and not checked.pulled:
        notes.append("Nobody was asked anything, and nothing was written.")
    return notes


# simulate --------------------------------------------------------------------------------------------------------------


def simulation(run: "Simulation", json_wanted: bool) -> None:
    """What a spec would do."""
    if json_wanted:
        return as_json(simulation_facts(run))
    console.print(simulation_view(run), soft_wrap=False)
    if run.events:
        heading("what happened")
    told = Counter((event.lane, _happened(event)) for _, event in run.events)
    first = {(event.lane, _happened(event)): seconds for seconds, event in reversed(run.events)}
    made = Table.grid(padding=(0, 2))
    made.add_column(justify="right", min_width=8)
    made.add_column(overflow="fold")
    for (lane, text), times in list(told.items())[:EVENTS]:
        again = f" ({times} times)" if times > 1 else ""
        made.add_row(duration(first[lane, text]), printable(f"{lane}: {text}{again}"))
    if len(told) > EVENTS:
        made.add_row("", f"… and {len(told) - EVENTS} more; all of them: --json")
    console.print(made, soft_wrap=False)


def _happened(event: "LaneEvent") -> str:
    if event.kind == "idle":
        reason = event.text.split(" ", 1)[0]
        return f"idle: {REASONS.get(reason, reason)}"
    return event.text or event.kind


def simulation_facts(run: "Simulation") -> dict[str, Any]:
    return asdict(run) | {"left": run.left}


def simulation_view(run: "Simulation") -> Group:
    why = f": {run.message}" if run.message else ""
    cap = "" if run.max_usd is None else f" of {money(run.max_usd)}"
    left = f", {run.left} still owed" if run.left > 0 else ""
    marks = ", ".join(f"{mark} % after {duration(seconds)}" for mark, seconds in run.milestones.items())
    parts: list[RenderableType] = [
        Text(f"{run.name}, simulated: {ENDS.get(run.end, run.end)} after {duration(run.seconds)}", style="bold"),
        Text(f"{run.accepted} of {run.target} samples{left}; {run.rejected} answers rejected, {run.failed} calls failed"),
        Text(f"cost {money(run.cost_usd)}{cap}"),
        *([Text(marks)] if marks else []),
        *([Text(printable(why.removeprefix(": ")))] if why else []),
        Text(),
        _simulated_lanes(run),
        Text(),
        _assumed(run.assumed),
    ]
    return Group(*parts)


def _simulated_lanes(run: "Simulation") -> Table:
    made = table("lane", ">calls", ">samples", ">s a call", ">cost", "took no more because")
    for lane in run.lanes:
        made.add_row(
            printable(lane.name),
            str(lane.calls),
            str(lane.accepted),
            "?" if lane.latency_s is None else f"{lane.latency_s:.2f}",
            money(lane.cost_usd) if lane.paid else "free",
            _idle(lane, run.seconds),
        )
    for name, seen in run.servers.items():
        refused = ", ".join(f"{count} × {reason}" for reason, count in seen.refused.most_common())
        swaps = f"{seen.swaps} swaps" if seen.swaps else ""
        if refused or swaps:
            made.add_row(f"  {printable(name)}", "", "", "", "", ", ".join(filter(None, (swaps, refused))))
    return _folding(made, 0, 5)


def _idle(lane: "SimulatedLane", seconds: float) -> str:
    """Reasons and the share of the time, the longest first."""
    shares = {reason: idle / seconds for reason, idle in lane.idle_s.items() if seconds and reason != "no_work"}
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{REASONS.get(reason, reason)} {percent(share)}" for reason, share in ranked if share >= IDLE_SHOWN) or "-"


def _assumed(lanes: Iterable["Assumed"]) -> Table:
    made = table("taken for granted", ">s a call", ">at once", ">accepted", "limits and faults", "known by")
    for lane in lanes:
        how = lane.behaviour
        limits = [f"{name} {value}" for name in ("rpm", "tpm", "rpd", "cap") if (value := getattr(how, name)) is not None]
        limits += [f"swap {how.swap_s:g} s"] * bool(how.swap_s) + [f"{len(how.down)} × down"] * bool(how.down)
        limits += [f"GPU {load:g} %" for _, load in how.gpu]
        limits += [f"faults {percent(how.fault_rate)}"] * bool(how.faults)
        made.add_row(
            printable(lane.lane),
            f"{how.latency_s:.2f}",
            str(how.par or "any"),
            percent(lane.accept),
            ", ".join(limits) or "-",
            {"said": "you", "assumed": "a guess"}.get(lane.source, lane.source),
        )
    return _folding(made, 0, 4)


def _folding(made: Table, *columns: int) -> Table:
    """Let long texts of these columns go on in the next line; the others keep theirs."""
    for number, column in enumerate(made.columns):
        column.no_wrap = number not in columns
        column.overflow = "fold"
    return made
