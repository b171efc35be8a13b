"""What a request may ask for: options, keep_alive, format. Names, types, defaults and error texts are Ollama's."""

import json
import re
from typing import Any, TypeVar

from trainer_node.runtime.models import ApiError

DEFAULT_KEEP_ALIVE_S = 300.0
FOREVER_S = float("inf")
DEFAULT_NUM_CTX = 4096
NUM_KEEP = 4

INTEGERS = {"num_ctx", "num_predict", "num_keep", "top_k", "seed", "repeat_last_n"}
FLOATS = {"temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
DEFAULTS: dict[str, Any] = {
    "num_ctx": DEFAULT_NUM_CTX,
    "num_keep": NUM_KEEP,
    "num_predict": -1,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": -1,
    "stop": [],
}
MAX_DURATION_S = (2**63 - 1) / 1e9  # of Go's durations; one that is longer is for ever
MAX_TOP_LOGPROBS = 20
JSON_NAMES = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
T = TypeVar("T", str, list[Any], dict[str, Any])
UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def field(body: dict[str, Any], name: str, kind: type[T]) -> T:
    """What a request says under `name`, an empty one where it says nothing. Raises ApiError (400) for another kind of value."""
    value = body.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        wrong, right = JSON_NAMES[type(value)], JSON_NAMES.get(kind, "object")
        raise ApiError(400, f"json: cannot unmarshal {wrong} into field {name} of type {right}")
    return value


def merged_options(*layers: dict[str, Any]) -> dict[str, Any]:
    """Defaults, then the model's parameters, then the request's. An unknown name is ignored, as Ollama does.

    Raises:
        ApiError: 500, an option of a wrong type.
    """
    options = dict(DEFAULTS)
    for layer in layers:
        options |= {name: _typed(name, value) for name, value in layer.items() if name in DEFAULTS and value is not None}
    return options


def _typed(name: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # 1e999 is infinite
    if name in INTEGERS:
        if not number:
            raise ApiError(500, f'option "{name}" must be of type integer')
        return int(value)
    if name in FLOATS:
        if not number:
            raise ApiError(500, f'option "{name}" must be of type float32')
        return float(value)
    if not isinstance(value, list):
        raise ApiError(500, f'option "{name}" must be of type array')
    if not all(isinstance(item, str) for item in value):
        raise ApiError(500, f'option "{name}" must be of an array of strings')
    return value


def keep_alive_s(value: Any) -> float:
    """Seconds that a model stays loaded after its last request: a number of seconds or a Go duration; negative: for ever.

    Raises:
        ApiError: 400.
    """
    if value is None:
        return DEFAULT_KEEP_ALIVE_S
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ApiError(400, f"json: cannot unmarshal {json.dumps(value)} into a duration")
    seconds = _duration_s(value) if isinstance(value, str) else float(value)
    return seconds if 0 <= seconds < MAX_DURATION_S else FOREVER_S


def _duration_s(text: str) -> float:
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if body == "0":
        return 0.0
    parts = re.findall(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)", body)
    if not parts or "".join(number + unit for number, unit in parts) != body:
        known = "missing unit in" if re.fullmatch(r"\d+\.?\d*", body) else "invalid"
        raise ApiError(400, f'time: {known} duration "{text}"')
    return sign * sum(float(number) * UNITS_S[unit] for number, unit in parts)


def top_logprobs(body: dict[str, Any]) -> int:
    """How many alternatives of a token are told. Raises ApiError (400)."""
    value = body.get("top_logprobs") or 0
    if not isinstance(value, int) or not 0 <= value <= MAX_TOP_LOGPROBS:
        raise ApiError(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    return value


def schema_of(format_: Any) -> dict[str, Any] | None:
    """The JSON schema that an answer must follow; {} for any JSON, None for free text. Raises ApiError (500)."""
    if format_ in (None, ""):
        return None
    if format_ == "json":
        return {}
    if isinstance(format_, dict):
        return format_
    shown = json.dumps(json.dumps(format_))
    raise ApiError(500, f'invalid format: {shown}; expected "json" or a valid JSON Schema object')
