"""Read a TOML file into a model; every mistake is reported with the file, the line and the nearest valid key.

A value that may hold a secret is never repeated: of a model with `hide_input_in_errors`, or where a validator raised `Untold`.
"""

import difflib
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from config.errors import ConfigError

ENCODING = "utf-8-sig"  # some editors of Windows begin a file with a byte order mark

M = TypeVar("M", bound=BaseModel)


class Untold(ValueError):
    """What a validator raises for a value that may hold a secret."""


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError where the file is missing, unreadable or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding=ENCODING))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file", hint="check the path; examples are in config/presets") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def load_toml(path: Path, model: type[M]) -> M:
    """The file as `model`. Raises ConfigError naming file, line and key of the first mistake."""
    table = read_toml(path)
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise mistake(path, error, model) from error


def mistake(path: Path, error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The first mistake of a validation, in the words of the person who wrote the file."""
    # A misspelt key also leaves the right one missing: the misspelling is what to say.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    keys = [str(part) for part in first["loc"]]
    where = f"{path}:{line_of(path.read_text(encoding=ENCODING), keys)}"
    name = ".".join(keys)
    if first["type"] == "extra_forbidden":
        known = known_keys(model, keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"known keys here: {', '.join(known)}"
        return ConfigError(f'{where}: unknown key "{name}"', hint=hint)
    if first["type"] == "missing":
        return ConfigError(f'{where}: the key "{name}" is missing', hint="add it")
    reason = first["msg"].removeprefix("Value error, ")
    secret = model.model_config.get("hide_input_in_errors") or isinstance(first.get("ctx", {}).get("error"), Untold)
    told = "" if secret or isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return ConfigError(f"{where}: {name or 'the file'}: {reason}{told}")


def known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The field names of the model that `path` leads to; the keys of tables that a person names are stepped over."""
    current: Any = model
    for part in path:
        current = _step(current, part)
    models = _models_in(current)
    return sorted(models[0].model_fields) if models else []


def line_of(text: str, keys: list[str]) -> int:
    """The line (from 1) of a dotted key, or of the nearest table above it; 1 if neither is found.

    An entry of an array of tables ([[price]]) is named by its number from 0: price, 1, model.
    """
    table: list[str] = []
    entries: Counter[str] = Counter()
    best, depth = 1, 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[+)([^\]]+)\]+", line):
            table = [part.strip().strip("\"'") for part in header[2].split(".")]
            if header[1] == "[[":
                entries[header[2]] += 1
                table.append(str(entries[header[2]] - 1))
            here = table
        elif key := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            here = table + [part.strip("\"'") for part in key[1].split(".")]
        else:
            continue
        if here == keys[: len(here)] and len(here) > depth:
            best, depth = number, len(here)
    return best


def _step(annotation: Any, part: str) -> Any:
    """The annotation of what the key `part` leads to; None where it leads nowhere."""
    if _is_model(annotation):
        return annotation.model_fields[part].annotation if part in annotation.model_fields else None
    if get_origin(annotation) in (dict, list):
        return get_args(annotation)[-1]
    inner = (_step(option, part) for option in get_args(annotation))  # of Annotated[…], … | None
    return next((found for found in inner if found is not None), None)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _models_in(annotation: Any) -> list[Any]:
    if _is_model(annotation):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
