"""What `hafs status` shows: the whole loop on one screen, 80x24 for what a person usually has; the rest is counted."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from campaigns.cli import render_train
from campaigns.cli.render import as_json, console, percent, printable
from campaigns.cli.render_campaign import campaign_facts
from campaigns.locate import jobs_at
from campaigns.logs import usd
from campaigns.overview import Overview, pushed
from campaigns.picture import Picture, picture_of
from campaigns.sync.survey import NodeState
from config.contracts.wire import ModelVersion, ServerResult

CAMPAIGNS, JOBS, MODELS = 4, 4, 2  # rows shown of each


def overview(seen: Overview, json_wanted: bool) -> None:
    campaigns = [picture_of(status) for status in seen.campaigns]
    if json_wanted:
        return as_json(_facts(seen, campaigns))
    console.print(overview_screen(seen, campaigns, time.time()), soft_wrap=False)


def overview_screen(seen: Overview, campaigns: Sequence[Picture], now: float) -> Group:
    """The screen. `now`: Unix seconds."""
    clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    return Group(
        _line(f"{clock}  {seen.home}"),
        *_campaigns(campaigns, seen.nodes),
        *_jobs(seen.nodes),
        *_models(seen.nodes),
        *_nodes(seen.nodes),
    )


def _campaigns(campaigns: Sequence[Picture], nodes: Sequence[NodeState]) -> list[RenderableType]:
    if not campaigns:
        return [_head("campaigns"), _line("  none yet: hafs campaign start FILE")]
    ranked = sorted(campaigns, key=lambda picture: not picture.running)
    rows = []
    nowhere = "push unknown" if _silent(nodes) else "not pushed"
    for picture in ranked[:CAMPAIGNS]:
        figures = picture.figures
        there = [
            f"{node} {data.rows}" if len(data.campaigns) == 1 else f"{node} in {data.name}"
            for node, data in pushed(nodes, picture.name).items()
        ]
        sent = f"on {', '.join(there)}" if there else nowhere
        done = f"{figures.accepted} of {figures.target}"
        rows.append([picture.name, picture.state, done, percent(figures.accept_rate), usd(figures.cost_usd), sent])
    return [_head("campaigns"), _rows(rows), *_more(len(ranked) - CAMPAIGNS, "hafs campaign list")]


def _silent(nodes: Sequence[NodeState]) -> bool:
    """Whether a node that does not answer may have what no other has."""
    return any(node.problem for node in nodes)


def _jobs(nodes: Sequence[NodeState]) -> list[RenderableType]:
    found = jobs_at(nodes)
    if not found:
        return [_head("jobs"), _line("  none yet: hafs train submit FILE")]
    ranked = sorted(found, key=lambda at: (at.job.state.ended, not at.job.state.active))
    rows = [[at.job.id, at.node, at.job.name, str(at.job.state), render_train.detail(at)] for at in ranked[:JOBS]]
    return [_head("jobs"), _rows(rows), *_more(len(ranked) - JOBS, "hafs train list")]


def _models(nodes: Sequence[NodeState]) -> list[RenderableType]:
    found = [(node.name, model) for node in nodes for model in node.seen.models]
    if not found:
        return [_head("models"), _line("  none seen" if _silent(nodes) else "  none yet")]
    found.sort(key=lambda pair: -pair[1].created_at)
    rows = [[model.tag, node, _alias(model), _perplexity(model)] for node, model in found[:MODELS]]
    return [_head("models"), _rows(rows), *_more(len(found) - MODELS, "hafs models list")]


def _nodes(nodes: Sequence[NodeState]) -> list[RenderableType]:
    rows = []
    for node in nodes:
        if node.problem:
            rows.append([node.name, f"{render_train.since(node.seen.at)}: {printable(str(node.problem))}"])
        else:
            rows.append([node.name, f"gpu: {render_train.gpu(node.gpu)}"])
            rows.append(["", f"server: {_server(node.server)}"])
    return [_head("nodes"), _rows(rows)]


def _server(server: ServerResult) -> str:
    if not server.url:
        return "none runs"
    kind = "hafs's own" if server.embedded else "Ollama"
    holds = f", holds {', '.join(server.loaded)}" if server.loaded else ""
    return f"{kind} {server.version}{holds}"


def _alias(model: ModelVersion) -> str:
    return f"= {model.alias}" if model.alias else ""


def _perplexity(model: ModelVersion) -> str:
    before, after = model.perplexity_base, model.perplexity_tuned
    return f"perplexity {before:.2f} -> {after:.2f}" if before is not None and after is not None else ""


def _facts(seen: Overview, campaigns: Sequence[Picture]) -> dict[str, Any]:
    nodes = [
        {
            "name": node.name,
            "problem": str(node.problem) if node.problem else "",
            "unknown_since": node.unknown_since,
            "jobs": [job.model_dump(mode="json") for job in node.seen.jobs],
            "models": [model.model_dump(mode="json") for model in node.seen.models],
            "datasets": [dataset.model_dump(mode="json") for dataset in node.seen.datasets],
            "gpu": node.gpu.model_dump(mode="json"),
            "server": node.server.model_dump(mode="json"),
        }
        for node in seen.nodes
    ]
    return {"home": seen.home, "campaigns": [campaign_facts(picture) for picture in campaigns], "nodes": nodes}


def _rows(rows: Sequence[Sequence[str]]) -> Table:
    """Each row on one line; what is too long loses its end, the last column first."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 1), expand=True)
    longest = 40 if console.width >= render_train.WIDE else 18
    for column in list(zip(*rows, strict=True))[:-1]:
        made.add_column(no_wrap=True, overflow="ellipsis", width=min(longest, max(map(len, column))))
    made.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def _more(count: int, where: str) -> list[RenderableType]:
    return [_line(f"  and {count} more: {where}")] if count > 0 else []


def _head(words: str) -> Text:
    return Text(words, style="bold")


def _line(words: str) -> Text:
    return Text(printable(words), no_wrap=True, overflow="ellipsis")
