"""What `hafs campaign` shows. The same picture serves `start`, `watch` and `status`; it fits a terminal of 80 columns."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from campaigns.cli.render import as_json, command, console, duration, line, percent, printable, table
from campaigns.live import EndFigures, Figures, LaneFigures
from campaigns.logs import REASONS, idle_times, usd
from campaigns.picture import Picture
from campaigns.status import CampaignEnd
from config.errors import INTERRUPTED, BudgetExceeded

if TYPE_CHECKING:
    from campaigns.detach import Started
    from campaigns.report import CampaignReport
    from campaigns.revise import Revision

WIDE = 120  # columns from which a lane's doing has a column of its own
WAITS = ("rate", "breaker", "threshold", "lease", "measuring", "swap", "budget", "storing")
DOING = {"": "working"} | {reason: f"waits: {words}" if reason in WAITS else words for reason, words in REASONS.items()}
ENDS = {
    "done": "complete",
    "drained": "stopped",
    "budget": "stopped at the budget",
    "exhausted": "no further calls would help",
    "error": "failed",
}


# one campaign ----------------------------------------------------------------------------------------------------------


def campaign_view(seen: Picture) -> Group:
    """A campaign on one screen."""
    where = f" (process {seen.pid})" if seen.running else ""
    parts: list[RenderableType] = [
        _words(f"{seen.name}: {seen.state}{where}", "bold"),
        _domains(seen.figures),
        _words(_pace(seen.figures)),
        _words(_money(seen.figures, seen.reserved_usd)),
    ]
    if seen.figures.reasons:
        ranked = sorted(seen.figures.reasons.items(), key=lambda item: -item[1])
        parts.append(_words("not accepted: " + ", ".join(f"{reason} {count}" for reason, count in ranked)))
    if seen.lanes:
        parts += [Text(), _lanes(seen.lanes, seen.running), *_errors(seen.lanes)]
    return Group(*parts)


def campaign_status(seen: Picture, json_wanted: bool) -> None:
    if json_wanted:
        return as_json(campaign_facts(seen))
    console.print(campaign_view(seen), soft_wrap=False)
    if not seen.running and seen.end and seen.end.hint:
        line(seen.end.hint)
    line()
    line(f"samples  {seen.files.samples}")
    line(f"log      {seen.files.log}")
    for what, words in next_commands(seen):
        line(f"{what:<8} {words}")


def next_commands(seen: Picture) -> list[tuple[str, str]]:
    """What a person may want to do next with a campaign."""
    if seen.running:
        return [("watch", command("campaign", "watch", seen.name)), ("stop", command("campaign", "stop", seen.name))]
    if seen.figures.accepted >= seen.figures.target:
        return [("report", command("campaign", "report", seen.name))]
    more = ["--max-usd", "USD"] if seen.end and seen.end.reason == "budget" else []
    return [("go on", command("campaign", "resume", seen.name, *more))]


def campaign_facts(seen: Picture) -> dict[str, Any]:
    figures = seen.figures
    return {
        "name": seen.name,
        "state": "running" if seen.running else seen.state.split(":")[0],
        "detail": seen.state,
        "process": seen.pid,
        "target": figures.target,
        "accepted": {name: domain.accepted for name, domain in figures.domains.items()},
        "wanted": {name: domain.wanted for name, domain in figures.domains.items()},
        "rejected": {name: domain.rejected for name, domain in figures.domains.items()},
        "failed": {name: domain.failed for name, domain in figures.domains.items()},
        "reasons": figures.reasons,
        "accept_rate": figures.accept_rate,
        "rate_per_s": figures.rate,
        "eta_s": figures.eta_s,
        "cost_usd": figures.cost_usd,
        "cost_assumed_usd": figures.assumed_usd,
        "reserved_usd": seen.reserved_usd,
        "max_usd": figures.max_usd,
        "lanes": [{**lane.model_dump(), "doing": _doing(lane, seen.lanes)} for lane in seen.lanes],
        "end": seen.end.model_dump() if seen.end else None,
        "samples": str(seen.files.samples),
        "log": str(seen.files.log),
    }


def progress_line(seen: Picture) -> str:
    """A campaign in one line, for a screen that is no terminal."""
    shares = [f"{name} {domain.accepted}/{domain.wanted}" for name, domain in seen.figures.domains.items()]
    return f"{', '.join(shares)}; {_pace(seen.figures)}; {_money(seen.figures, 0.0)}"


def campaign_end(end: CampaignEnd | EndFigures) -> None:
    if end.reason == "error":
        return line(f"failed: {end.message}")
    line(f"{ENDS.get(end.reason, end.reason)}: {end.message} ({end.new} new, {usd(end.cost_usd)} in all)")


def campaign_exit_code(end: CampaignEnd) -> int:
    return {"done": 0, "drained": INTERRUPTED, "budget": BudgetExceeded.exit_code}.get(end.reason, 1)


# several, and around them ----------------------------------------------------------------------------------------------


def campaign_list(seen: Sequence[Picture], json_wanted: bool) -> None:
    if json_wanted:
        return as_json([campaign_facts(picture) for picture in seen])
    if not seen:
        return line("no campaigns yet: hafs campaign start FILE")
    made = table("campaign", "state", ">accepted", ">target", ">accept rate", ">cost")
    made.columns[1].overflow = "fold"
    for picture in seen:
        figures = picture.figures
        rate, cost = percent(figures.accept_rate), usd(figures.cost_usd)
        made.add_row(picture.name, Text(printable(picture.state)), str(figures.accepted), str(figures.target), rate, cost)
    console.print(made, soft_wrap=False)


def campaign_report(report: "CampaignReport", json_wanted: bool) -> None:
    from rich.markdown import Markdown

    from campaigns.report import facts, markdown

    if json_wanted:
        return as_json({**facts(report), "lanes": [asdict(lane) for lane in report.lanes]})
    if console.is_terminal:
        return console.print(Markdown(printable(markdown(report)), hyperlinks=False), soft_wrap=False)
    line(markdown(report))


def started(name: str, log: str, outcome: "Started") -> None:
    """A campaign that runs in the background: who it is and how to come back to it."""
    line(f"campaign {name} runs in the background (process {outcome.pid})")
    if not outcome.answered:
        line("no answer of a model yet: a big model may take a while to load")
    line(f"  log    {log}")
    line(f"  watch  {command('campaign', 'watch', name)}")
    line(f"  stop   {command('campaign', 'stop', name)}")


def extended(name: str, change: "Revision") -> None:
    old, new = change.old, change.new
    if new.target != old.target:
        line(f"{name}: {new.target} samples wanted (before: {old.target})")
    if new.budget != old.budget:
        line(f"{name}: may cost {_cap(new.budget.max_usd)} (before: {_cap(old.budget.max_usd)})")
    line(f"go on with: {command('campaign', 'resume', name)}")
    line("its TOML file is as it was: starting that file again would set back what is written there")


# parts -----------------------------------------------------------------------------------------------------------------


def _words(text: str, style: str = "") -> Text:
    """A line that is folded where the terminal ends, also in a live display."""
    return Text(printable(text), style=style, no_wrap=False, overflow="fold")


def _domains(figures: Figures) -> Table:
    made = table("domain", ">accepted", ">", ">rejected", ">failed")
    for name, domain in figures.domains.items():
        share = percent(domain.accepted / max(1, domain.wanted))
        made.add_row(name, f"{domain.accepted}/{domain.wanted}", share, str(domain.rejected), str(domain.failed))
    if len(figures.domains) > 1:
        share = percent(figures.accepted / max(1, figures.target))
        counts = (f"{figures.accepted}/{figures.target}", share, str(figures.rejected), str(figures.failed))
        made.add_row("all", *counts, style="bold")
    return made


def _pace(figures: Figures) -> str:
    rate = f"; {figures.rate:.2f} samples/s" if figures.rate else ""
    eta = f"; about {duration(figures.eta_s)} left" if figures.eta_s is not None else ""
    return f"accepted {percent(figures.accept_rate)} of {figures.accepted + figures.rejected} answers{rate}{eta}"


def _money(figures: Figures, reserved_usd: float) -> str:
    cap = f" of {_cap(figures.max_usd)}" if figures.max_usd is not None else ""
    assumed = f", of it {usd(figures.assumed_usd)} assumed" if figures.assumed_usd else ""
    held = f", {usd(reserved_usd)} held for calls that run" if reserved_usd else ""
    return f"cost {usd(figures.cost_usd)}{cap}{assumed}{held}"


def _cap(max_usd: float | None) -> str:
    return "any amount" if max_usd is None else usd(max_usd)


def _lanes(lanes: Sequence[LaneFigures], running: bool) -> Table:
    """A row a lane; where the terminal is narrow, what it does is a second line below its name."""
    wide = console.width >= WIDE
    pace = (">running", ">per s", ">tokens/s") if running else ()
    made = table("lane", *(("doing" if running else "last run",) if wide else ()), *pace, ">ok", ">errors", ">cost")
    for lane in lanes:
        doing = Text(printable(_doing(lane, lanes) if running else _idle(lane)))
        name = [Text(lane.name), doing] if wide else [Group(Text(lane.name), Padding(doing, (0, 0, 0, 2), style="dim"))]
        figures = [f"{lane.in_flight}/{lane.limit}", f"{lane.per_s:.2f}", f"{lane.tokens_per_s:.0f}"] if running else []
        made.add_row(*name, *figures, str(lane.ok), str(lane.failed), usd(lane.cost_usd) if lane.paid else "free")
    made.columns[0].overflow = "fold"
    return made


def _doing(lane: LaneFigures, lanes: Sequence[LaneFigures]) -> str:
    """What a lane does now, or why it does nothing."""
    doing = DOING.get(lane.idle, lane.idle)
    if lane.idle in ("", "limit") and not lane.in_flight and _shared(lane, lanes):
        return "its server serves other lanes"
    if lane.idle in ("", "limit", "closed", "no_work") or not lane.in_flight:
        return doing
    return f"{doing}; {lane.in_flight} run on"


def _shared(lane: LaneFigures, lanes: Sequence[LaneFigures]) -> bool:
    return any(other.in_flight for other in lanes if other.endpoint == lane.endpoint)


def _idle(lane: LaneFigures) -> str:
    """Where its time went in the last run, of a lane that works no more."""
    spent = ", ".join(f"{REASONS.get(reason, reason)} {duration(seconds)}" for reason, seconds in idle_times(lane.idle_s))
    return f"idle: {spent}" if spent else "never idle"


def _errors(lanes: Sequence[LaneFigures]) -> list[Text]:
    """Why lanes are closed or their servers do not answer."""
    troubled = [lane for lane in lanes if lane.last_error and lane.idle in ("closed", "breaker")]
    return [_words(f"{lane.name}: {lane.last_error}", "yellow") for lane in troubled]
