"""`hafs doctor`: what a campaign on this machine would stumble over, found before it starts. Nothing is changed and nothing
costs: servers are only asked for the names of their models.
"""

import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import anyio
from anyio import to_thread

from agents.providers.base import Provider
from campaigns.spec import AUTO, CampaignSpec, LaneSpec
from config.errors import AuthFailed, HafsError
from config.settings import Settings

OWN_PACKAGES = ("agents", "campaigns", "config")
GEMINI_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
GOOGLE = "https://generativelanguage.googleapis.com"
ANSWER_S = 15.0
CLOCK_S = 60.0  # a clock that is further off than this breaks TLS, tokens and quotas of a day
FREE_GB = 2.0

Verdict = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """`hint` says what to do. "warn": a campaign may do without it."""

    name: str
    verdict: Verdict
    detail: str
    hint: str = ""


def examine(settings: Settings, spec: CampaignSpec | None = None) -> list[Check]:
    """All checks; with a spec also those of its lanes, where what is missing is a failure."""
    here = [_python(), _own_packages(), _packages("laptop"), _home(settings), _disk(settings), _keys_file(settings)]
    if spec and (spec.observe.prometheus_port or spec.observe.otlp_endpoint):
        here.append(_packages("observe"))
    if any(check.verdict == "fail" for check in here[1:3]):
        return here  # without its packages nothing can be asked
    return here + anyio.run(_ask_all, settings, spec)


# this machine ----------------------------------------------------------------------------------------------------------


def _python() -> Check:
    detail = f"{sys.version.split()[0]} at {sys.executable}"
    return Check("Python", "ok", detail) if sys.version_info >= (3, 11) else Check("Python", "fail", detail, "hafs needs 3.11")


def _own_packages() -> Check:
    """The names are common ones: another package called `config` or `agents` may stand before ours."""
    home = Path(__file__).resolve().parent.parent
    foreign = [f"{name} comes from {found}" for name in OWN_PACKAGES if (found := _origin(name)) != home / name]
    if foreign:
        return Check("hafs itself", "fail", "; ".join(foreign), "install hafs into a virtual environment of its own")
    return Check("hafs itself", "ok", f"{importlib.metadata.version('hafs')} at {home}")


def _origin(name: str) -> Path | None:
    found = find_spec(name)
    return Path(found.origin).resolve().parent if found and found.origin else None


def _packages(extra: str) -> Check:
    wanted = [
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        for requirement in importlib.metadata.requires("hafs") or []
        if re.search(rf"extra == ['\"]{extra}['\"]", requirement)
    ]
    missing = [name for name in wanted if not _installed(name)]
    if missing:
        return Check(f"{extra} packages", "fail", f"missing: {', '.join(missing)}", f'pip install "hafs[{extra}]"')
    return Check(f"{extra} packages", "ok", f"{len(wanted)} found")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _home(settings: Settings) -> Check:
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.home) as probe:
            probe.write(b"hafs")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        hint = "make the folder yours, or set HAFS_HOME to another one"
        return Check("folder", "fail", f"{settings.home}: {error.strerror or error}", hint)
    return Check("folder", "ok", str(settings.home))


def _disk(settings: Settings) -> Check:
    place = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < FREE_GB:
        return Check("disk", "warn", f"{free_gb:.1f} GB free", "free some space, or set HAFS_HOME to another disk")
    return Check("disk", "ok", f"{free_gb:.0f} GB free")


def _keys_file(settings: Settings) -> Check:
    path = settings.keys_file
    if not path.exists():
        return Check("keys.toml", "ok", "not there: keys come from the environment")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        return Check("keys.toml", "fail", f"{path} can be read by others", f"chmod 600 {path}")
    return Check("keys.toml", "ok", f"{path}, for your eyes only")


# servers ---------------------------------------------------------------------------------------------------------------

Ask = Callable[[], Awaitable[Check]]


async def _ask_all(settings: Settings, spec: CampaignSpec | None) -> list[Check]:
    """All servers at once; the checks in the order of `asks`."""
    asks: list[Ask] = []
    gemini = [lane for lane in spec.lanes.values() if lane.provider == "gemini"] if spec else []
    if spec is None or gemini:
        asks.append(partial(_gemini, settings, gemini))
    if spec is None:
        asks.append(_own_ollama)
    else:
        asks += [partial(_lane, settings, name, lane) for name, lane in spec.lanes.items() if lane.provider != "gemini"]
    asks += [partial(_node, settings, name, _needed(name, spec)) for name in settings.nodes()]
    if gemini_key(settings) and (spec is None or gemini):
        asks.append(partial(_clock, gemini[0].base_url if gemini else ""))
    checks: dict[int, Check] = {}

    async def one(number: int, ask: Ask) -> None:
        checks[number] = await ask()

    async with anyio.create_task_group() as group:
        for number, ask in enumerate(asks):
            group.start_soon(one, number, ask)
    return [checks[number] for number in range(len(asks))]


def gemini_key(settings: Settings) -> str:
    """The key for Gemini, of the environment or keys.toml; empty for none."""
    return next((key for name in GEMINI_KEYS if (key := settings.key(name))), "")


async def _gemini(settings: Settings, lanes: Sequence[LaneSpec]) -> Check:
    key = gemini_key(settings)
    if not key:
        hint = "get a key at https://aistudio.google.com/apikey and export GEMINI_API_KEY=…, or give it to: hafs init"
        return Check("Gemini", "fail" if lanes else "warn", "no key", hint)
    from agents.providers.gemini import GeminiProvider

    base_url = lanes[0].base_url if lanes else ""
    wanted = sorted({model for lane in lanes for model in lane.all_models})
    hint = "see the names at https://ai.google.dev/gemini-api/docs/models"
    return await _models("Gemini", lambda: GeminiProvider(base_url=base_url, api_key=key), wanted, hint, needed=bool(lanes))


async def _own_ollama() -> Check:
    from agents.providers.ollama import OllamaProvider

    hint = 'start it with `ollama serve`; a lane with host = "auto" uses the embedded runtime without it'
    return await _models("Ollama", OllamaProvider, [], hint, needed=False)


async def _lane(settings: Settings, name: str, lane: LaneSpec) -> Check:
    what = f"lane {name}"
    if lane.host == AUTO:
        return Check(what, "ok", "the Ollama of this machine, or the embedded runtime: found or started with the campaign")
    if lane.node:
        return Check(what, "ok", f"reached through the node {lane.node}: see there")
    if lane.provider == "openai":
        from agents.providers.openai_compatible import OpenAIProvider

        hint = f"is base_url = {lane.base_url!r} right, and api_key_env the variable that holds its key?"
        key = settings.key(lane.key_name)
        return await _models(what, lambda: OpenAIProvider(lane.base_url, api_key=key), lane.all_models, hint, needed=True)
    from agents.providers.ollama import OllamaProvider

    hint = "fetch it: hafs campaign check FILE --pull"
    return await _models(
        what, lambda: OllamaProvider(lane.host, api_key=settings.key("OLLAMA_API_KEY")), lane.all_models, hint, needed=True
    )


async def _models(what: str, open_it: Callable[[], Provider], wanted: Sequence[str], hint: str, *, needed: bool) -> Check:
    """Ask a server for its models. `hint` is for a model that is missing."""
    worst: Verdict = "fail" if needed else "warn"
    try:
        provider = open_it()
        try:
            with anyio.fail_after(ANSWER_S):
                names = await provider.models()
        finally:
            await provider.aclose()
    except TimeoutError:
        return Check(what, worst, f"no answer within {ANSWER_S:g} s", "is the address right, and the network up?")
    except AuthFailed as error:
        return Check(what, "fail", str(error), error.hint)
    except HafsError as error:
        return Check(what, worst, str(error), error.hint or hint)
    known = {name.removeprefix("models/").removesuffix(":latest") for name in names}
    if missing := [model for model in wanted if model.removeprefix("models/").removesuffix(":latest") not in known]:
        return Check(what, "fail", f"it does not have {', '.join(missing)}", hint)
    return Check(what, "ok", f"it answers and has {', '.join(wanted) or f'{len(names)} models'}")


def _needed(node: str, spec: CampaignSpec | None) -> bool:
    return spec is not None and any(
        lane.node == node or (lane.gpu and lane.gpu.telemetry == node) for lane in spec.lanes.values()
    )


async def _node(settings: Settings, name: str, needed: bool) -> Check:
    what = f"node {name}"
    try:
        return Check(what, "ok", await to_thread.run_sync(_ping, settings, name))
    except HafsError as error:
        return Check(what, "fail" if needed else "warn", str(error), error.hint or f"look closer with: hafs nodes check {name}")


def _ping(settings: Settings, name: str) -> str:
    from campaigns.sync.remote import connect
    from config.contracts.wire import PING, Nothing

    with connect(settings, name) as remote:
        pong = remote.call(PING, Nothing())
    return f"hafs {pong.hafs} on {pong.platform}"


async def _clock(base_url: str) -> Check:
    """This machine's clock beside that of the server whose quota of a day counts."""
    import httpx

    url = base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL") or GOOGLE
    try:
        async with httpx.AsyncClient(timeout=ANSWER_S) as client:
            reply = await client.head(url)
        there = parsedate_to_datetime(reply.headers["date"]).timestamp()
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Check("clock", "warn", f"could not be compared: {error or type(error).__name__}", "is the network up?")
    off_s = time.time() - there
    if abs(off_s) > CLOCK_S:
        return Check("clock", "fail", f"{abs(off_s):.0f} s {'ahead' if off_s > 0 else 'behind'}", "let the system set it (NTP)")
    return Check("clock", "ok", "right")
