"""What can be typed in a chat beside a question: `/word …`. A path (/usr/bin) is no command."""

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from agents.task import Sampling
from config.contracts.feedback import Rating
from config.errors import ConfigError


class Command(NamedTuple):
    """`takes` is what stands behind the word, in [] where it may be left out."""

    takes: str
    does: str


COMMANDS = {
    "help": Command("", "this list"),
    "system": Command("[TEXT|off]", "show, set or remove the system message"),
    "set": Command("[NAME VALUE]", "change a setting (temperature 0.2), or list them"),
    "rate": Command("up|down [NOTE]", "keep your verdict on the last answer"),
    "retry": Command("", "ask the last question again"),
    "undo": Command("", "take back the last question and its answer"),
    "clear": Command("", "begin anew; the system message stays"),
    "save": Command("FILE", "write the conversation to a new file (.json: as JSON)"),
    "model": Command("NAME", "go on with another model of the same server"),
    "info": Command("", "model, server, settings and size of the conversation"),
    "quit": Command("", "end; so does Ctrl-D"),
}
_ALIASES = {"?": "help", "exit": "quit", "bye": "quit", "q": "quit"}
_TYPED = re.compile(r"/([A-Za-z?]\w*)(?:\s+(.*))?\Z", re.DOTALL)
RATINGS: dict[str, Rating] = {"up": "up", "down": "down"}


class _Parameter(NamedTuple):
    read: Callable[[str], Any]
    least: float
    most: float
    off: bool = False  # whether it may be left to the server


PARAMETERS = {
    "temperature": _Parameter(float, 0, 2),
    "top_p": _Parameter(float, 0.01, 1),
    "top_k": _Parameter(int, 0, 2**31 - 1, off=True),
    "max_tokens": _Parameter(int, 1, 2**31 - 1),
    "num_ctx": _Parameter(int, 256, 2**31 - 1),
    "seed": _Parameter(int, 0, 2**31 - 1, off=True),
}


def parse(typed: str) -> tuple[str, str] | None:
    """Command and the rest of what was typed; None for a question.

    Raises:
        ConfigError: there is no such command; it names the nearest, or is told that it lacks or has too many words.
    """
    found = _TYPED.match(typed.strip())
    if not found:
        return None
    word, rest = found[1].lower(), (found[2] or "").strip()
    word = _ALIASES.get(word, word)
    if word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, 1, 0.5)
        hint = f"did you mean /{near[0]}? /help lists them all" if near else "/help lists them all"
        raise ConfigError(f"there is no command /{found[1]}", hint=hint)
    takes = COMMANDS[word].takes
    if (rest and not takes) or (takes and not takes.startswith("[") and not rest):
        raise ConfigError(f"/{word} takes {takes or 'nothing else'}", hint=f"it does this: {COMMANDS[word].does}")
    return word, rest


def changed(sampling: Sampling, text: str) -> Sampling:
    """`sampling` after `/set text`, such as "temperature 0.2". Raises ConfigError with what would be right."""
    name, value = _words(text.replace("=", " "))
    parameter = PARAMETERS.get(name)
    if parameter is None:
        near = difflib.get_close_matches(name, PARAMETERS, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(PARAMETERS)}"
        raise ConfigError(f'"{name}" cannot be set', hint=hint)
    if parameter.off and value in ("off", "none"):
        return _with(sampling, name, None)
    kind = "a whole number" if parameter.read is int else "a number"
    most = f" to {parameter.most:g}" if parameter.most < 2**31 - 1 else " on"
    allowed = f"{kind} from {parameter.least:g}{most}{', or off' if parameter.off else ''}"
    try:
        number = parameter.read(value)
    except ValueError:
        raise ConfigError(f'{name} cannot be "{value}"', hint=f"it is {allowed}") from None
    if not parameter.least <= number <= parameter.most:
        raise ConfigError(f"{name} cannot be {value}", hint=f"it is {allowed}")
    return _with(sampling, name, number)


def setting(sampling: Sampling, name: str) -> str:
    """One of PARAMETERS as it is now, in words."""
    value = getattr(sampling, name)
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _with(sampling: Sampling, name: str, value: Any) -> Sampling:
    field: dict[str, Any] = {name: value}
    return replace(sampling, **field)


def rating(text: str) -> tuple[Rating, str]:
    """`up` or `down`, and the note, of `/rate text`. Raises ConfigError."""
    word, note = _words(text)
    if word in RATINGS:
        return RATINGS[word], note
    raise ConfigError(f'an answer is rated up or down, not "{word}"', hint="for example: /rate down it names the wrong register")


def _words(text: str) -> tuple[str, str]:
    """The first word and the rest."""
    first, *rest = text.split(None, 1) or [""]
    return first, rest[0].strip() if rest else ""
