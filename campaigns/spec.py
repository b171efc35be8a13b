"""The spec of a campaign and of a loop: TOML files that a person writes. Unknown keys are errors."""

import glob
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from agents.task import Sampling
from config.contracts.base import Strict
from config.contracts.manifest import NAME
from config.errors import ConfigError, SourceMissing
from config.toml import line_of, load_toml

Name = Annotated[str, Field(pattern=NAME)]
AUTO = "auto"  # a lane's host: the Ollama server of this machine, or the embedded runtime


def _seconds(value: object) -> object:
    """Seconds from "90s", "2m" or "1h"; numbers are left as they are."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)", value)
    if not match:
        raise ValueError('write a duration as "90s", "2m" or "1h"')
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


class LaneSpec(Strict):
    """One way to a model. `gguf` (a file or package:NAME) is registered at an `auto` host under the name `model`."""

    provider: Literal["ollama", "gemini"]
    model: str = Field(min_length=1)
    slots: int = Field(4, ge=1, le=512)
    timeout: Seconds = 120.0
    host: str = ""
    gguf: str = ""
    base_url: str = ""
    rpm: int | None = Field(None, ge=1)
    thinking_budget: int | None = Field(None, ge=-1)

    @model_validator(mode="after")
    def _keys_of_the_provider(self) -> "LaneSpec":
        foreign = {"ollama": ("base_url", "rpm", "thinking_budget"), "gemini": ("host", "gguf")}[self.provider]
        wrong = [key for key in foreign if getattr(self, key) != type(self).model_fields[key].default]
        if wrong:
            raise ValueError(f"{wrong[0]} does not belong to a lane with provider = {self.provider!r}")
        if self.gguf and self.host != AUTO:
            raise ValueError(f'gguf needs host = "{AUTO}"')
        return self


class BudgetSpec(Strict):
    max_usd: float | None = Field(None, ge=0)


class SamplingSpec(Strict):
    temperature: float = Field(0.4, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(96, ge=1)
    num_ctx: int = Field(2048, ge=256)
    seed: int = 0

    def sampling(self, draw: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens, self.num_ctx, self.seed + draw)


class CampaignSpec(Strict):
    """`target` counts accepted samples; `domains` are shares of it. `routing` absent: every lane serves every domain."""

    name: Name
    target: int = Field(ge=1)
    domains: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    lanes: dict[Name, LaneSpec] = Field(min_length=1)
    budget: BudgetSpec = BudgetSpec()
    sampling: SamplingSpec = SamplingSpec()
    routing: dict[str, list[str]] = {}
    sources: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _names_exist(self) -> "CampaignSpec":
        for domain, lanes in self.routing.items():
            if unknown := [lane for lane in lanes if lane not in self.lanes]:
                raise ValueError(f'routing.{domain} names the lane "{unknown[0]}"; lanes are: {", ".join(self.lanes)}')
        if unknown := [name for name in (*self.routing, *self.sources) if name not in self.domains]:
            raise ValueError(f'"{unknown[0]}" is not one of the domains: {", ".join(self.domains)}')
        return self


class EvaluateSpec(Strict):
    questions: int = Field(60, ge=1, description="questions of each held-out set")
    examples: int = Field(3, ge=0, description="worked examples the base model also gets")
    slots: int = Field(4, ge=1)


class LoopSpec(Strict):
    """The whole loop. `campaign` and `train` are files beside this one; each is also good for its own command."""

    name: Name
    campaign: str
    train: str
    node: Name = "local"
    evaluate: EvaluateSpec = EvaluateSpec()


def load_campaign(path: Path) -> CampaignSpec:
    """Raises ConfigError for a wrong file, SourceMissing for a source pattern that matches nothing."""
    spec = load_toml(path, CampaignSpec)
    for domain, patterns in spec.sources.items():
        for pattern in patterns:
            if not expand(pattern, path.parent):
                line = line_of(path.read_text(encoding="utf-8"), ["sources", domain])
                raise SourceMissing(
                    f'{path}:{line}: sources.{domain}: nothing matches "{pattern}"',
                    hint="check the folder, or leave the line out to use the corpus that ships with the domain",
                )
    return spec


def source_files(spec: CampaignSpec, domain: str, base: Path) -> list[Path]:
    """The files of a domain's sources, sorted; relative patterns start at `base`."""
    return sorted({file for pattern in spec.sources.get(domain, []) for file in expand(pattern, base)})


def expand(pattern: str, base: Path) -> list[Path]:
    """Files that a pattern, a file or a folder (all files below it) names."""
    path = base / Path(pattern).expanduser()
    if path.is_dir():
        path = path / "**" / "*"
    return [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]


def beside(path: Path, key: str, name: str) -> Path:
    """The file that `key` of a loop file names, relative to it. Raises ConfigError where it does not exist."""
    found = path.parent / Path(name).expanduser()
    if not found.is_file():
        line = line_of(path.read_text(encoding="utf-8"), [key])
        raise ConfigError(f'{path}:{line}: {key} = "{name}": no such file', hint="the path is relative to the loop file")
    return found
