"""From messages to the tokens of a prompt.

A control token is parsed where the template put it, never in a message (`trainer_node/special_text.py`): what a person writes
opens no turn and ends none. A raw prompt is a template filled in by its sender, so there it is parsed. The vocabulary of a model
is read once, when its first prompt comes.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_node.runtime.engine import Engine
from trainer_node.runtime.gguf_file import read_vocabulary
from trainer_node.runtime.go_template import GoTemplate
from trainer_node.runtime.models import Model
from trainer_node.special_text import MARK, mark, specials_of, split, stripping_of


@dataclass(frozen=True)
class Specials:
    """The control tokens of a vocabulary: id by text, and which take the white space behind them."""

    ids: dict[str, int]
    stripping: frozenset[str]


class Prompts:
    def __init__(self) -> None:
        self._templates: dict[str, GoTemplate] = {}
        self._specials: dict[Path, Specials] = {}

    async def tokens(self, engine: Engine, model: Model, messages: list[dict[str, Any]]) -> list[int]:
        """The whole prompt, by the model's own template. Raises ApiError where that refuses the messages."""
        specials = await self._specials_of(model)
        marked = [{name: mark(text, specials.ids) for name, text in message.items()} for message in messages]
        text = await self._rendered(engine, model, marked)
        if MARK not in text:
            return await engine.tokenize(text)
        tokens: list[int] = []
        for part, special in split(text, specials.ids, specials.stripping):
            tokens += [specials.ids[part]] if special else await engine.tokenize_text(part)
        return engine.with_bos(tokens)

    async def _rendered(self, engine: Engine, model: Model, messages: list[dict[str, Any]]) -> str:
        source = model.template
        if source is None:
            return await engine.apply_template(messages)
        if source not in self._templates:
            self._templates[source] = GoTemplate(source)
        return self._templates[source].render(messages)

    async def _specials_of(self, model: Model) -> Specials:
        assert model.weights
        if model.weights not in self._specials:
            self._specials[model.weights] = await asyncio.to_thread(_read, model.weights)
        return self._specials[model.weights]


def _read(weights: Path) -> Specials:
    vocabulary = read_vocabulary(weights)
    texts = set(specials_of(vocabulary.tokens, vocabulary.types))
    ids = {token: number for number, token in enumerate(vocabulary.tokens) if token in texts}
    return Specials(ids, stripping_of(vocabulary.name, texts))
