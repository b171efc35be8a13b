"""`hafs campaign check` and `simulate`: what a spec would take, before anything is spent."""

from pathlib import Path
from typing import Annotated

import typer

Spec = Annotated[Path, typer.Argument(help="The campaign's TOML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check(
    spec: Spec,
    probe: Annotated[bool, typer.Option("--probe", help="Send one request to every lane: does it answer, how fast?")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch models that the lanes' Ollama servers lack.")] = False,
    as_json: Json = False,
) -> None:
    """Validate a campaign's file and show its plan: tokens, cost, hours, disk, and who is asked. Without --probe nobody is."""
    from campaigns.check import check as look_ahead
    from campaigns.cli import render_plan
    from campaigns.spec import load_campaign
    from config.settings import load_settings

    loaded = load_campaign(spec)
    checked = look_ahead(load_settings(), loaded, spec.parent, probe=probe, pull=pull, show=render_plan.pulling)
    render_plan.plan(checked, as_json)
    raise typer.Exit(render_plan.exit_code(checked))


def simulate(
    spec: Spec,
    lane: Annotated[
        list[str] | None, typer.Option("--lane", help="NAME=latency:0.8,par:4,accept:0.9,down:5m-10m,…: how it behaves.")
    ] = None,
    lanes: Annotated[
        Path | None, typer.Option("--lanes", help="TOML file with the same keys, in a table lanes.NAME each.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another run of chance.")] = 0,
    as_json: Json = False,
) -> None:
    """Run the campaign on a clock that does not wait, with servers that are only described. Nobody is asked."""
    from campaigns.cli import render_plan
    from campaigns.described import described
    from campaigns.simulate import simulate as run
    from campaigns.spec import load_campaign
    from config.settings import load_settings

    loaded = load_campaign(spec)
    said = described(lane or [], lanes, loaded)
    render_plan.simulation(run(load_settings(), loaded, spec.parent, said, seed), as_json)
