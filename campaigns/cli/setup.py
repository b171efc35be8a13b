"""`hafs init` and `hafs doctor`: from nothing to a campaign that can be started."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from campaigns.starter import Answers, Found
    from config.settings import Settings


def init(
    folder: Annotated[Path, typer.Argument(help="Where the campaign's file goes.")] = Path("."),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is found here.")] = False,
) -> None:
    """Write a first campaign, from a few questions and what is found on this machine."""
    from campaigns import starter
    from campaigns.cli import render
    from config.settings import load_settings

    settings = load_settings()
    starter.require_new(folder)
    found = starter.look_around(settings)
    _tell(found)
    answers = found.defaults(starter.campaign_name(folder))
    path = starter.write_first(folder, starter.spec_text(answers if yes else _ask(settings, found, answers)))
    render.line(f"wrote {path}")
    render.line(f"  what it would do and cost  {render.command('campaign', 'check', str(path))}")
    render.line(f"  start it                   {render.command('campaign', 'start', str(path))}")


def doctor(
    spec: Annotated[Path | None, typer.Argument(help="A campaign's TOML file: its servers and models are looked at too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what campaigns need: packages, keys, model servers, nodes, disk, clock. Costs nothing, changes nothing."""
    from campaigns.cli import render_setup
    from campaigns.doctor import examine
    from campaigns.spec import load_campaign
    from config.settings import load_settings

    checks = examine(load_settings(), load_campaign(spec) if spec else None)
    render_setup.checks(checks, as_json)
    raise typer.Exit(1 if any(check.verdict == "fail" for check in checks) else 0)


def _tell(found: "Found") -> None:
    from campaigns.cli import render

    models = ", ".join(found.models) or "no models yet"
    render.line(f"Ollama at {found.ollama_host}: {models if found.ollama_up else 'does not answer'}")
    render.line(f"key for Gemini: {'found' if found.gemini_key else 'none'}")


def _ask(settings: "Settings", found: "Found", answers: "Answers") -> "Answers":
    """The questions, each with what was found as its default."""
    answers = replace(
        answers,
        name=typer.prompt("Name of the campaign", answers.name),
        domain=typer.prompt(f"Domain ({', '.join(found.domains)})", answers.domain),
    )
    answers = _ask_ollama(settings, found, answers)
    answers = _ask_gemini(settings, found, answers)
    if answers.gemini:
        answers = replace(answers, max_usd=typer.prompt("The most it may cost, in USD", answers.max_usd, type=float))
    return replace(answers, target=typer.prompt("Samples wanted", answers.target, type=int))


def _ask_ollama(settings: "Settings", found: "Found", answers: "Answers") -> "Answers":
    from campaigns.cli import render
    from campaigns.spec import AUTO
    from campaigns.starter import look_around

    host = typer.prompt(f'Where is Ollama? (an address; "{AUTO}": started by hafs; "none")', answers.ollama_host or "none")
    if host == "none":
        return replace(answers, ollama_host="", ollama_model="")
    if host not in (AUTO, found.ollama_host):
        found = look_around(settings, host)
        _tell(found)
        answers = found.defaults(answers.name)
    if found.models:
        render.line(f"its models: {', '.join(found.models)}")
    return replace(answers, ollama_host=host, ollama_model=typer.prompt("Model", answers.ollama_model or None))


def _ask_gemini(settings: "Settings", found: "Found", answers: "Answers") -> "Answers":
    from campaigns.cli import render
    from campaigns.doctor import GEMINI_KEYS

    if found.gemini_key:
        return replace(answers, gemini=typer.confirm("Use Gemini too? It costs money.", True))
    key = typer.prompt("Key for Gemini, if you have one (it is not shown; Enter: none)", "", hide_input=True, show_default=False)
    if key:
        settings.keep_key(GEMINI_KEYS[0], key)
        render.line(f"the key is kept in {settings.keys_file}, which only you can read")
    return replace(answers, gemini=bool(key))
