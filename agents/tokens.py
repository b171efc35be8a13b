"""Bounds on the tokens of a prompt, without a tokenizer. The true count lies between them, for every tokenizer that

- falls back to bytes (so a token stands for at least one byte of UTF-8), and
- never joins two words, or a word and a number, into one token.

Byte-level BPE (GPT, Llama 3, Qwen, SmolLM) and SentencePiece with byte fallback (Gemma, Gemini, Llama 2) are such.
"""

import re
from collections.abc import Sequence

from config.contracts.sample import Message

# Role, separators and end marks of one message in a chat template; SentencePiece adds a leading space to each piece of text.
_TEMPLATE_TOKENS = 16
# Letters (o200k keeps "don't" together) or digits.
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+")


def at_least(messages: Sequence[Message]) -> int:
    """Tokens that a prompt surely has; template tokens are not counted."""
    return sum(len(_WORD.findall(message.content)) for message in messages)


def at_most(messages: Sequence[Message]) -> int:
    """Tokens that a prompt surely does not exceed: what a budget reserves."""
    return sum(len(message.content.encode()) + _TEMPLATE_TOKENS for message in messages) + _TEMPLATE_TOKENS
