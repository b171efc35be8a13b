"""The spec of a campaign and of a loop: TOML files that a person writes. Unknown keys are errors."""

import glob
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from agents.addresses import at_home
from agents.task import Sampling
from config.contracts.base import Strict, canonical_json
from config.contracts.manifest import NAME
from config.errors import ConfigError, SourceMissing
from config.settings import plain_address, require_name
from config.toml import Untold, line_of, load_toml

Name = Annotated[str, Field(pattern=NAME)]
LaneName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]  # no colon: LANE:MODEL has to be clear
CampaignName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.{}-]{0,79}$")]
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


def _address(value: str) -> str:
    if not plain_address(value):
        raise Untold("an address holds no user, password or query: it stands in logs; give keys by the environment or hafs init")
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"([A-Z_][A-Z0-9_]*)?", value):
        raise Untold("give the name of an environment variable, in capitals; never the key itself")
    return value


Address = Annotated[str, AfterValidator(_address)]
Variable = Annotated[str, AfterValidator(_variable)]


class GpuSpec(Strict):
    """When to leave the GPU to others. `telemetry`: "local" (NVML here), "latency" (the lane's own speed), or a node's name."""

    low: float = Field(30, ge=0, le=100)
    high: float = Field(60, ge=0, le=100)
    telemetry: str = Field("", description="empty: the lane's node, else NVML on this machine if there is one, else latency")

    @model_validator(mode="after")
    def _low_below_high(self) -> "GpuSpec":
        if self.low >= self.high:
            raise ValueError("gpu.low has to be below gpu.high")
        return self


class LaneSpec(Strict):
    """One way to a model server. `model` or `models`: each model of `models` is a lane of its own, called LANE:MODEL.

    `gguf` (a file or package:NAME) is registered at an `auto` host under the name `model`. `slots` absent: found by measuring.
    `own`: the server is the user's own machine (free, and private sources may go there); absent: told from the address.
    """

    provider: Literal["ollama", "gemini", "openai"]
    model: str = ""
    models: list[Annotated[str, Field(min_length=1)]] = []
    slots: int | None = Field(None, ge=1, le=4096)
    timeout: Seconds = 120.0
    idle_timeout: Seconds | None = Field(None, description="between two pieces of an answer; given, answers are streamed")
    host: Address = ""
    node: str = ""
    gguf: str = ""
    gpu: GpuSpec | None = None
    base_url: Address = ""
    api_key_env: Variable = ""
    own: bool | None = None
    rpm: int | None = Field(None, ge=1)
    tpm: int | None = Field(None, ge=1)
    rpd: int | None = Field(None, ge=1)
    thinking_budget: int | None = Field(None, ge=-1)
    mode: Literal["online", "batch"] = "online"
    batch_patience: Seconds = Field(24 * 3600.0, description="a batch that takes longer is left, and its tasks go online")

    @model_validator(mode="after")
    def _keys_fit(self) -> "LaneSpec":
        foreign = {
            "ollama": ("base_url", "api_key_env", "rpm", "tpm", "rpd", "thinking_budget", "mode", "batch_patience"),
            "gemini": ("host", "node", "gguf", "gpu", "api_key_env", "own"),
            "openai": ("host", "node", "gguf", "thinking_budget", "mode", "batch_patience"),
        }[self.provider]
        wrong = [key for key in foreign if getattr(self, key) != type(self).model_fields[key].default]
        if wrong:
            raise ValueError(f"{wrong[0]} does not belong to a lane with provider = {self.provider!r}")
        if bool(self.model) == bool(self.models):
            raise ValueError("give model (one) or models (several)")
        if len(set(self.models)) < len(self.models):
            raise ValueError("models names one model twice")
        if self.gguf and (self.host != AUTO or not self.model):
            raise ValueError(f'gguf needs model and host = "{AUTO}"')
        if self.provider == "ollama" and bool(self.host) == bool(self.node):
            raise ValueError(f'an Ollama lane needs a host ("http://127.0.0.1:11434", or "{AUTO}") or a node')
        if self.provider == "openai" and not self.base_url:
            raise ValueError('an OpenAI-compatible lane needs base_url ("http://127.0.0.1:8000/v1")')
        return self

    @property
    def all_models(self) -> list[str]:
        return self.models or [self.model]

    @property
    def key_name(self) -> str:
        """The variable that holds an OpenAI-compatible lane's key; empty: none is sent. OpenAI's own key goes to OpenAI alone."""
        host = urlsplit(self.base_url).hostname or ""
        return self.api_key_env or ("OPENAI_API_KEY" if f".{host}".endswith(".openai.com") else "")

    def own_machine(self, model: str) -> bool:
        """Whether what is sent stays on the user's own machines (and costs nothing but power)."""
        if self.own is not None:
            return self.own
        if self.provider == "ollama":  # models of Ollama's cloud are answered elsewhere, by way of a server at home
            return not re.search(r"[:-]cloud$", model) and (urlsplit(self.host).hostname or "") != "ollama.com"
        return self.provider == "openai" and at_home(urlsplit(self.base_url).hostname or "")


class BudgetSpec(Strict):
    """`paid`: when lanes that cost money take work: at once when the free ones are busy, or only as far as the deadline (from
    the start of a run) needs it. Absent: when_late if there is a deadline, else at_once.
    """

    max_usd: float | None = Field(None, ge=0)
    deadline: Seconds | None = None
    paid: Literal["at_once", "when_late"] | None = None
    hedge_paid: bool = False

    @model_validator(mode="after")
    def _late_for_what(self) -> "BudgetSpec":
        if self.paid == "when_late" and self.deadline is None:
            raise ValueError('paid = "when_late" needs a deadline')
        return self


class SamplingSpec(Strict):
    """`json_schema`: a JSON Schema that answers have to follow: a file beside the spec, or its text."""

    temperature: float = Field(0.4, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(96, ge=1)
    num_ctx: int = Field(2048, ge=256)
    seed: int = 0
    json_schema: str = ""

    def sampling(self, draw: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens, self.num_ctx, self.seed + draw, self.json_schema)


class NotifySpec(Strict):
    """Tell somebody: `command` (words; the message is its standard input) and `url` (a webhook) on these occasions."""

    command: list[str] = []
    url: str = ""
    on: list[Literal["end", "failure", "budget"]] = ["end", "failure", "budget"]


class ObserveSpec(Strict):
    """Figures for monitoring. `prometheus_port`: served on this machine alone; `otlp_endpoint`: a collector's address."""

    prometheus_port: int | None = Field(None, ge=1, le=65535)
    otlp_endpoint: Annotated[Address, Field(pattern=r"^(https?://.+)?$")] = ""


class DomainSpec(Strict):
    """`private`: what is asked about this domain never leaves the user's own machines."""

    share: float = Field(gt=0)
    private: bool = False


class SourceSpec(Strict):
    """Files of a domain. One private source makes its whole domain private."""

    path: str
    private: bool = False


def _domain(value: object) -> object:
    return {"share": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


Share = Annotated[DomainSpec, BeforeValidator(_domain)]
Source = Annotated[SourceSpec, BeforeValidator(_source)]


class CampaignSpec(Strict):
    """`target` counts accepted samples; `domains` are shares of it. `routing` absent: every lane serves every domain.

    A name of `routing` is a lane, or LANE:MODEL for one model of a lane. `{date}` in `name` stands for the day it is started.
    """

    name: CampaignName
    target: int = Field(ge=1)
    domains: dict[str, Share] = Field(min_length=1)
    lanes: dict[LaneName, LaneSpec] = Field(min_length=1)
    budget: BudgetSpec = BudgetSpec()
    sampling: SamplingSpec = SamplingSpec()
    routing: dict[str, list[str]] = {}
    sources: dict[str, list[Source]] = {}
    notify: NotifySpec = NotifySpec()
    observe: ObserveSpec = ObserveSpec()

    @model_validator(mode="after")
    def _names_exist(self) -> "CampaignSpec":
        known = {route for name in self.lanes for route in (name, *self._models_of(name))}
        for domain, lanes in self.routing.items():
            if unknown := [lane for lane in lanes if lane not in known]:
                raise ValueError(f'routing.{domain} names the lane "{unknown[0]}"; lanes are: {", ".join(sorted(known))}')
            if not lanes:
                raise ValueError(f"routing.{domain} names no lane; leave it out to allow every lane")
        if unknown := [name for name in (*self.routing, *self.sources) if name not in self.domains]:
            raise ValueError(f'"{unknown[0]}" is not one of the domains: {", ".join(self.domains)}')
        for domain in self.domains:
            if not self.route(domain):
                raise ValueError(f'domain "{domain}" is private, and none of its lanes is a machine of yours')
        return self

    def _models_of(self, lane: str) -> list[str]:
        return [f"{lane}:{model}" for model in self.lanes[lane].all_models]

    def lane_names(self) -> dict[str, tuple[str, str]]:
        """Every way to one model, by the name that logs and provenance show: (key under [lanes], model)."""
        return {
            f"{key}:{model}" if lane.models else key: (key, model)
            for key, lane in self.lanes.items()
            for model in lane.all_models
        }

    def private(self, domain: str) -> bool:
        return self.domains[domain].private or any(source.private for source in self.sources.get(domain, []))

    def route(self, domain: str) -> list[str]:
        """Names (of `lane_names`) that may serve a domain, in order of preference; what is private stays at home."""
        wanted = self.routing.get(domain, list(self.lanes))
        names = self.lane_names()
        route = [
            name
            for want in wanted
            for name, (key, model) in names.items()
            if want in (key, f"{key}:{model}")
            if not self.private(domain) or self.lanes[key].own_machine(model)
        ]
        return list(dict.fromkeys(route))


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


def load_campaign(path: Path, name: str = "") -> CampaignSpec:
    """The spec in a file, under its own name or `name`; `{date}` in it and the file of a JSON Schema are filled in.

    Raises:
        ConfigError: a wrong file or name.
        SourceMissing: a source pattern that matches nothing.
    """
    spec = load_toml(path, CampaignSpec)
    name = require_name((name or spec.name).replace("{date}", f"{datetime.now().astimezone():%Y-%m-%d}"), "campaign")
    sampling = spec.sampling.model_copy(update={"json_schema": _schema_text(path, spec.sampling.json_schema)})
    spec = spec.model_copy(update={"name": name, "sampling": sampling})
    for domain, patterns in spec.sources.items():
        for pattern in (source.path for source in patterns):
            if not expand(pattern, path.parent):
                line = line_of(path.read_text(encoding="utf-8"), ["sources", domain])
                raise SourceMissing(
                    f'{path}:{line}: sources.{domain}: nothing matches "{pattern}"',
                    hint="check the folder, or leave the line out to use the corpus that ships with the domain",
                )
    return spec


def _schema_text(path: Path, schema: str) -> str:
    """The canonical text of a JSON Schema that is given as such or as a file beside the spec; empty for none."""
    if not schema:
        return ""
    text = schema if schema.lstrip().startswith("{") else beside(path, "sampling.json_schema", schema).read_text(encoding="utf-8")
    try:
        return canonical_json(json.loads(text)).decode()
    except ValueError as error:
        line = line_of(path.read_text(encoding="utf-8"), ["sampling", "json_schema"])
        raise ConfigError(f"{path}:{line}: sampling.json_schema is no JSON: {error}") from error


def source_files(spec: CampaignSpec, domain: str, base: Path) -> list[Path]:
    """The files of a domain's sources, sorted; relative patterns start at `base`."""
    return sorted({file for source in spec.sources.get(domain, []) for file in expand(source.path, base)})


def expand(pattern: str, base: Path) -> list[Path]:
    """Files that a pattern, a file or a folder (all files below it) names."""
    path = base / Path(pattern).expanduser()
    if path.is_dir():
        path = path / "**" / "*"
    return [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]


def beside(path: Path, key: str, name: str) -> Path:
    """The file that a dotted `key` of a TOML file names, relative to it. Raises ConfigError where it does not exist."""
    found = path.parent / Path(name).expanduser()
    if not found.is_file():
        line = line_of(path.read_text(encoding="utf-8"), key.split("."))
        raise ConfigError(f'{path}:{line}: {key} = "{name}": no such file', hint=f"the path is relative to {path.name}")
    return found
