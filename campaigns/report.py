"""What became of a campaign: per domain, per lane, why answers were not accepted, what it cost and where time went.

Everything is counted from calls.jsonl, whatever number of runs made it; only why lanes were idle is known of the last run alone.
"""

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from campaigns.live import Figures, LaneFigures
from campaigns.logs import REASONS, idle_times, span, usd
from campaigns.picture import look_at
from campaigns.rows import read_lines
from config.settings import Settings

MOVED = "A task that took several requests stands, with all that they cost, at the lane of the last one."
PAUSE_S = 300.0  # calls that end further apart than this have a pause of the campaign between them


@dataclass
class LaneReport:
    """Tasks that ended at one lane. Cost in USD, of all requests for them, wherever they were made; times in seconds; `ok` were
    answered, accepted or not; `retried` took more than one request.
    """

    lane: str
    model: str = ""
    ok: int = 0
    accepted: int = 0
    failed: int = 0
    retried: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    latency_median_s: float = 0.0
    latency_p95_s: float = 0.0


@dataclass
class CampaignReport:
    """`wall_s` is the time in which calls ended, without the pauses between runs; `samples_per_s` are accepted ones in it."""

    name: str
    state: str
    figures: Figures
    lanes: list[LaneReport]
    last_run: list[LaneFigures]
    wall_s: float = 0.0
    samples_per_s: float | None = None
    first_call: float | None = None  # Unix seconds
    last_call: float | None = None
    usd_per_sample: float | None = None


@dataclass
class _Times:
    """When calls ended. They are in order but for moments, so a look back suffices."""

    first: float | None = None
    last: float = 0.0
    wall_s: float = 0.0

    def add(self, moment: float) -> None:
        if not moment:  # a row that a crash swallowed and that was mended
            return
        if self.first is None:
            self.first = self.last = moment
        gap = moment - self.last
        if 0 < gap <= PAUSE_S:
            self.wall_s += gap
        self.last = max(self.last, moment)


@dataclass
class _Lanes:
    reports: dict[str, LaneReport] = field(default_factory=dict)
    latencies: dict[str, "array[float]"] = field(default_factory=dict)

    def add(self, call: Mapping[str, Any]) -> None:
        name = call.get("lane", "")
        report = self.reports.setdefault(name, LaneReport(name))
        report.model = call.get("model") or report.model  # a call without an answer names none
        report.cost_usd += call.get("cost_usd", 0.0)
        report.retried += call.get("attempt", 1) > 1
        report.prompt_tokens += call.get("prompt_tokens", 0)
        report.completion_tokens += call.get("completion_tokens", 0) + call.get("thinking_tokens", 0)
        if call["verdict"] == "failed":
            report.failed += 1
            return
        report.ok += 1
        report.accepted += call["verdict"] == "accepted"
        if latency_s := call.get("latency_s"):
            self.latencies.setdefault(name, array("f")).append(latency_s)

    def finished(self) -> list[LaneReport]:
        for name, latencies in self.latencies.items():
            ranked = sorted(latencies)
            self.reports[name].latency_median_s = ranked[len(ranked) // 2]
            self.reports[name].latency_p95_s = ranked[int(0.95 * (len(ranked) - 1))]
        return sorted(self.reports.values(), key=lambda report: -report.ok)


def report_of(settings: Settings, name: str) -> CampaignReport:
    """Read all calls of a campaign once.

    Raises:
        ConfigError: there is no such campaign.
        StoreCorrupt: a line of calls.jsonl is none.
    """
    picture = look_at(settings, name)
    times, lanes = _Times(), _Lanes()
    for call in read_lines(picture.files.calls):
        times.add(call.get("time", 0.0))
        lanes.add(call)
    accepted = picture.figures.accepted
    return CampaignReport(
        name=name,
        state=picture.state,
        figures=picture.figures,
        lanes=lanes.finished(),
        last_run=picture.lanes,
        wall_s=times.wall_s,
        samples_per_s=accepted / times.wall_s if times.wall_s else None,
        first_call=times.first,
        last_call=times.last or None,
        usd_per_sample=picture.figures.cost_usd / accepted if accepted else None,
    )


def facts(report: CampaignReport) -> dict[str, Any]:
    """For --json."""
    plain = {key: value for key, value in vars(report).items() if key not in ("figures", "lanes", "last_run")}
    return {
        **plain,
        **report.figures.model_dump(),
        "accept_rate": report.figures.accept_rate,
        "lanes": [vars(lane) for lane in report.lanes],
        "idle_s": {lane.name: lane.idle_s for lane in report.last_run},
    }


def markdown(report: CampaignReport) -> str:
    """The report as a page."""
    figures = report.figures
    rate = f"{report.samples_per_s:.2f} samples/s" if report.samples_per_s else "no rate yet"
    each = f", ${report.usd_per_sample:.6f} a sample" if report.usd_per_sample is not None else ""
    accept = _percent(figures.accepted, figures.accepted + figures.rejected)
    assumed = f", of it {usd(figures.assumed_usd)} assumed" if figures.assumed_usd else ""
    cap = f" of {usd(figures.max_usd)}" if figures.max_usd is not None else ""
    parts = [
        f"# Campaign {report.name}: {report.state}",
        f"{figures.accepted} of {figures.target} samples; {accept} of the answers were accepted; {figures.failed} calls failed.",
        f"Cost {usd(figures.cost_usd)}{cap}{assumed}{each}. Working time {span(report.wall_s)}, {rate}.",
        "## Domains",
        _domains(figures),
        "## Lanes",
        _lanes(report.lanes),
        *([MOVED] if any(lane.retried for lane in report.lanes) else []),
        "## Tokens and latency",
        _answers(report.lanes),
    ]
    if figures.reasons:
        parts += ["## Why answers were not accepted", _reasons(figures)]
    if any(idle_times(lane.idle_s) for lane in report.last_run):
        parts += ["## Why lanes were idle", "In the last run alone; earlier ones are in the log.", _idle(report.last_run)]
    return "\n\n".join(parts) + "\n"


def _domains(figures: Figures) -> str:
    rows = [
        [name, domain.accepted, domain.wanted, _percent(domain.accepted, domain.wanted), domain.rejected, domain.failed]
        for name, domain in figures.domains.items()
    ]
    return _table(["domain", "accepted", "wanted", "done", "rejected", "failed"], rows)


def _lanes(lanes: list[LaneReport]) -> str:
    rows = [
        [lane.lane, lane.ok, _percent(lane.accepted, lane.ok), lane.failed, lane.retried, f"{lane.cost_usd:.4f}"]
        for lane in lanes
    ]
    return _table(["lane", "answers", "accepted", "failed", "retried", "USD"], rows)


def _answers(lanes: list[LaneReport]) -> str:
    columns = ["lane", "tokens in", "tokens out", "median s", "p95 s"]
    rows = [
        [
            lane.lane,
            lane.prompt_tokens,
            lane.completion_tokens,
            f"{lane.latency_median_s:.2f}",
            f"{lane.latency_p95_s:.2f}",
        ]
        for lane in lanes
    ]
    return _table(columns, rows)


def _reasons(figures: Figures) -> str:
    lost = sum(figures.reasons.values())
    ranked = Counter(figures.reasons).most_common()
    return _table(["reason", "calls", "share"], [[reason, count, _percent(count, lost)] for reason, count in ranked])


def _idle(lanes: list[LaneFigures]) -> str:
    rows = [
        [lane.name, REASONS.get(reason, reason), f"{seconds:.0f}"]
        for lane in lanes
        for reason, seconds in idle_times(lane.idle_s)
    ]
    return _table(["lane", "reason", "seconds"], rows)


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table that also reads well as it is."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    numbers = [index > 0 and all(_number(line[index]) for line in cells) for index in range(len(columns))]

    def written(line: list[str]) -> str:
        padded = [cell.rjust(w) if number else cell.ljust(w) for cell, w, number in zip(line, widths, numbers, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, numbers, strict=True)]
    return "\n".join([written(columns), f"| {' | '.join(rule)} |", *map(written, cells)])


def _number(cell: str) -> bool:
    return cell.removesuffix(" %").replace(".", "", 1).isdecimal()


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
