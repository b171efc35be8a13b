"""Lanes that are only described, for `hafs campaign simulate`: what a person says of them, the rest from history, else assumed.

Said on the command line as NAME=key:value,…  or in a TOML file with a table [lanes.NAME]; the keys are those of LaneDescription.
NAME is a lane of the spec; for one with several models it stands for all of them, NAME:MODEL for one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from agents.simulated import Behaviour, Fault, Window
from campaigns.history import Past
from campaigns.spec import CampaignSpec, LaneSpec, Seconds
from config.contracts.base import Strict
from config.errors import ConfigError
from config.toml import load_toml

# What is assumed of a lane that nobody described and that has never answered.
_OWN_TOKENS_PER_S, _HOSTED_TOKENS_PER_S = 60.0, 150.0
_OWN_FIRST_S, _HOSTED_FIRST_S = 0.2, 0.6
_SPREAD = 0.3
_ACCEPT = 0.8
_OWN_PAR = 4
_SWAP_S = 5.0
_BATCH_S = 3600.0
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def _plain_seconds(value: object) -> object:
    """Seconds from "0.8"; what has a unit is left to the next validator."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(?:\.\d+)?", value) else value


Duration = Annotated[Seconds, BeforeValidator(_plain_seconds)]
Times = Annotated[str, Field(pattern=r"^\d+(\.\d+)?[smh]?-\d+(\.\d+)?[smh]?$")]
Load = Annotated[str, Field(pattern=r"^\d+(\.\d+)?[smh]?-\d+(\.\d+)?[smh]?@\d+(\.\d+)?$")]


class LaneDescription(Strict):
    """How a lane's server behaves. Times as 0.8, "90s", "5m"; windows as "300-600" or "5m-10m" of the simulated time.

    `accept`: share of its answers that become samples. `down`: windows in which it cannot be reached. `gpu`: windows with a load
    of others on its GPU, in %: "10m-40m@80". `tokens`: of a median answer. The rest is that of agents.simulated.Behaviour.
    """

    latency: Duration | None = None
    spread: float | None = Field(None, ge=0, le=3)
    par: int | None = Field(None, ge=1)
    queue: int = Field(512, ge=0)
    swap: Duration | None = None
    cap: int | None = Field(None, ge=1)
    rpm: int | None = Field(None, ge=1)
    tpm: int | None = Field(None, ge=1)
    rpd: int | None = Field(None, ge=1)
    accept: float | None = Field(None, ge=0, le=1)
    tokens: int | None = Field(None, ge=1)
    thinking: int = Field(0, ge=0)
    down: list[Times] = []
    gpu: list[Load] = []
    faults: list[Fault] = []
    fault_rate: float = Field(0.0, ge=0, le=1)


class DescriptionFile(Strict):
    lanes: dict[str, LaneDescription] = {}


@dataclass(frozen=True)
class Assumed:
    """What is simulated for one lane, and where its figures come from: said, history or assumed."""

    lane: str
    behaviour: Behaviour
    accept: float
    source: str


def described(options: Sequence[str], file: Path | None, spec: CampaignSpec) -> dict[str, LaneDescription]:
    """What a person said, by name of lane; an option goes before the file.

    Raises:
        ConfigError: an option or a file that is none, or a lane that the spec does not have.
    """
    said = dict(load_toml(file, DescriptionFile).lanes) if file else {}
    for option in options:
        name, description = parse_option(option)
        said[name] = description
    known = {*spec.lanes, *spec.lane_names()}
    if unknown := [name for name in said if name not in known]:
        raise ConfigError(f'the campaign has no lane "{unknown[0]}"', hint=f"its lanes: {', '.join(sorted(known))}")
    return said


def parse_option(text: str) -> tuple[str, LaneDescription]:
    """NAME and description of "NAME=latency:0.8,par:4". Raises ConfigError."""
    name, equals, rest = text.partition("=")
    values: dict[str, Any] = {}
    for key, colon, value in (part.partition(":") for part in rest.split(",") if part):
        if not colon:
            raise ConfigError(f'--lane {text}: "{key}" has no value', hint="write it as NAME=latency:0.8,par:4,down:5m-10m")
        if key in ("down", "gpu", "faults"):
            values.setdefault(key, []).append(value)
        else:
            values[key] = value
    if not (name and equals):
        raise ConfigError(f"--lane {text}: no lane is named", hint="write it as NAME=latency:0.8,par:4,down:5m-10m")
    try:
        return name, LaneDescription.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        hint = f"keys: {', '.join(LaneDescription.model_fields)}"
        raise ConfigError(f"--lane {text}: {first['loc'][0]}: {first['msg']}", hint=hint) from error


def assume(spec: CampaignSpec, said: Mapping[str, LaneDescription], past: Mapping[str, Past]) -> dict[str, Assumed]:
    """What to simulate for every lane of a spec."""
    made = {}
    for name, (key, _) in spec.lane_names().items():
        told = said.get(name, said.get(key))
        made[name] = _assume(spec, name, told or LaneDescription(), past.get(name), "said" if told else "assumed")
    return made


def _assume(spec: CampaignSpec, name: str, told: LaneDescription, past: Past | None, source: str) -> Assumed:
    key, model = spec.lane_names()[name]
    lane = spec.lanes[key]
    own = lane.own_machine(model)
    answer_tokens = told.tokens or _typical_tokens(spec, past)
    latency_s, spread = _typical_latency(lane, past, own, answer_tokens)
    behaviour = Behaviour(
        latency_s=told.latency or latency_s,
        spread=spread if told.spread is None else told.spread,
        par=told.par or (lane.slots or _OWN_PAR if own else None),
        queue=told.queue,
        swap_s=told.swap or (_SWAP_S if _several_on_one_server(spec, lane) else 0.0),
        cap=told.cap,
        rpm=told.rpm or lane.rpm,
        tpm=told.tpm or lane.tpm,
        rpd=told.rpd or lane.rpd,
        down=tuple(_window(text) for text in told.down),
        gpu=tuple((_window(text.partition("@")[0]), float(text.partition("@")[2])) for text in told.gpu),
        faults=tuple(told.faults),
        fault_rate=told.fault_rate,
        answer_tokens=answer_tokens,
        thinking_tokens=told.thinking,
    )
    accept = told.accept if told.accept is not None else past.accepted / past.answered if past else _ACCEPT
    return Assumed(name, behaviour, accept, source if source == "said" else f"{past.answered} calls" if past else source)


def _typical_tokens(spec: CampaignSpec, past: Past | None) -> int:
    if past is not None:
        return max(1, round(fmean(past.completion_tokens)))
    return max(1, spec.sampling.max_tokens // 2)


def _typical_latency(lane: LaneSpec, past: Past | None, own: bool, answer_tokens: int) -> tuple[float, float]:
    """Median and sigma of a lognormal distribution of latencies."""
    if past is not None and len(positive := [log(seconds) for seconds in past.latency_s if seconds > 0]) > 1:
        return exp(fmean(positive)), stdev(positive)
    if lane.mode == "batch":
        return _BATCH_S, _SPREAD
    if own:
        return _OWN_FIRST_S + answer_tokens / _OWN_TOKENS_PER_S, _SPREAD
    return _HOSTED_FIRST_S + answer_tokens / _HOSTED_TOKENS_PER_S, _SPREAD


def _several_on_one_server(spec: CampaignSpec, lane: LaneSpec) -> bool:
    models = {
        model
        for other in spec.lanes.values()
        if other.provider == lane.provider == "ollama" and (other.host, other.node) == (lane.host, lane.node)
        for model in other.all_models
    }
    return len(models) > 1


def _window(text: str) -> Window:
    start, end = (_seconds(part) for part in text.split("-"))
    if end <= start:
        raise ConfigError(f'the window "{text}" ends before it starts', hint="write it as 300-600 or 5m-10m")
    return Window(start, end)


def _seconds(text: str) -> float:
    unit = text[-1] if text[-1] in "smh" else ""
    return float(text.removesuffix(unit)) * _UNITS[unit]
