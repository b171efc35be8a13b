"""Modelfile: what `ollama create -f` takes to make the same model elsewhere. It stands beside the GGUF that it names."""

from collections.abc import Sequence
from typing import Any

from config.contracts.base import Tolerant

QUOTES = '"""'


class Dress(Tolerant):
    """What a model server puts around the weights. `template` is a Go template; empty: the one inside the GGUF."""

    system: str = ""
    template: str = ""
    parameters: dict[str, Any] = {}
    licenses: list[str] = []


def modelfile(source: str, dress: Dress, *, adapter: str = "", comment: str = "") -> str:
    """The text of one. Of the parameters a list is written one value a line, as Ollama takes stops.

    Args:
        source: of FROM: a tag, or a path that begins with a dot.
        adapter: of ADAPTER, where there is one.
        comment: lines to put before it.
    """
    lines = [f"# {line}" for line in comment.splitlines()] + [f"FROM {source}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    for word, text in (("TEMPLATE", dress.template), ("SYSTEM", dress.system), *(("LICENSE", each) for each in dress.licenses)):
        if QUOTES in text:
            lines.append(f"# {word} is left out: a Modelfile cannot hold a text with {QUOTES} in it")
        elif text:
            lines.append(f"{word} {QUOTES}{text}{QUOTES}")
    for name, value in dress.parameters.items():
        values: Sequence[Any] = value if isinstance(value, list) else [value]
        lines += [f"PARAMETER {name} {_quoted(each)}" for each in values]
    return "\n".join(lines) + "\n"


def _quoted(value: Any) -> str:
    """The quotes around a text are taken off and nothing in it is unescaped."""
    return f'"{value}"' if isinstance(value, str) else str(value)
