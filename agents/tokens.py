"""Tokens of a prompt, without a tokenizer. The true count lies between `at_least` and `at_most` for every tokenizer that

- falls back to bytes (so a token stands for at least one byte of UTF-8), and
- never joins two words, or a word and a number, into one token.

Byte-level BPE (GPT, Llama 3, Qwen, SmolLM) and SentencePiece with byte fallback (Gemma, Gemini, Llama 2) are such.
"""

import re
from collections.abc import Sequence

from config.contracts.sample import Message

# Role, separators and end marks of one message in a chat template; SentencePiece adds a leading space to each piece of text.
_TEMPLATE_TOKENS = 16
_LIKELY_TEMPLATE_TOKENS = 5
_BYTES_PER_TOKEN = 3.5
_LEAST_THINKING = 128  # of gemini-2.5-pro, which cannot be kept from it
_MOST_THINKING = {"pro": 32_768, "flash": 24_576}
# Letters (o200k keeps "don't" together) or digits.
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+")


def at_least(messages: Sequence[Message]) -> int:
    """Tokens that a prompt surely has; template tokens are not counted."""
    return sum(len(_WORD.findall(message.content)) for message in messages)


def at_most(messages: Sequence[Message], schema: str = "") -> int:
    """Tokens that a prompt surely does not exceed: what a budget reserves. A server may show the model the JSON Schema, too."""
    texts = [message.content for message in messages] + [schema] * bool(schema)
    return sum(len(text.encode()) + _TEMPLATE_TOKENS for text in texts) + _TEMPLATE_TOKENS


def likely(messages: Sequence[Message]) -> int:
    """About as many tokens as a prompt of English and code has in the tokenizers of today: a guess, not a bound."""
    size = sum(len(message.content.encode()) for message in messages)
    return round(size / _BYTES_PER_TOKEN) + _LIKELY_TEMPLATE_TOKENS * len(messages)


def thinking_at_most(provider: str, model: str, budget: int | None) -> int:
    """Tokens of thinking that may be billed on top of `max_tokens`. `budget`: the lane's; -1: as many as the model likes.

    Servers were seen to count thinking within the limit of the answer (googleapis/python-genai #811, #2062), as OpenAI's
    documentation says; Google's says that they are separate. So what is asked of Gemini in so many tokens counts on top.
    """
    if provider != "gemini":
        return 0
    if budget is None:  # none is asked for, or the least that the model allows
        return _LEAST_THINKING if "2.5-pro" in model else 0
    return budget if budget >= 0 else _MOST_THINKING["pro" if "pro" in model else "flash"]
