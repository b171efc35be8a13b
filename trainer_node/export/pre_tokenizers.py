"""How a byte-pair vocabulary cuts text into words before it merges: what llama.cpp calls it, how a tokenizer.json describes it.

A name is decided by the structure of the pre-tokenizer and by nothing else. The expressions are llama.cpp's, which training
uses, too: where a tokenizer.json writes one in another way (`also`), it means the same up to rare letters.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from config.errors import JobFailed

CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
CONTRACTIONS_ALSO = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
CASED_CAPITALS = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
CASED_ALSO = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
CASED_CAPITALS_ALSO = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS, BYTES = "each digit alone", "bytes by GPT-2's expression"


@dataclass(frozen=True)
class PreTokenizer:
    """`steps`: DIGITS, BYTES or an expression. `whole_words`: a word that is a token is not merged (`ignore_merges`)."""

    name: str  # tokenizer.ggml.pre
    steps: tuple[str, ...]
    whole_words: bool = False
    also: str = ""  # another way in which a tokenizer.json writes the expression


THREE_DIGITS, THREE_DIGITS_ALSO = (f"{start}{WORDS}\\p{{N}}{{1,3}}{REST}" for start in (CONTRACTIONS, CONTRACTIONS_ALSO))

KNOWN = (
    PreTokenizer("gpt-2", (BYTES,)),
    PreTokenizer("smollm", (DIGITS, BYTES)),
    PreTokenizer("llama-bpe", (THREE_DIGITS,), True, THREE_DIGITS_ALSO),
    PreTokenizer("dbrx", (THREE_DIGITS,), False, THREE_DIGITS_ALSO),
    PreTokenizer("qwen2", (f"{CONTRACTIONS}{WORDS}\\p{{N}}{REST}",), False, f"{CONTRACTIONS_ALSO}{WORDS}\\p{{N}}{REST}"),
    PreTokenizer(
        "tekken",
        (f"{CASED}|{CASED_CAPITALS}|\\p{{N}}{CASED_REST}",),
        True,
        f"{CASED_ALSO}|{CASED_CAPITALS_ALSO}|\\p{{N}}{CASED_REST}",
    ),
    PreTokenizer(
        "gpt-4o",
        (f"{CASED}{CONTRACTIONS}?|{CASED_CAPITALS}{CONTRACTIONS}?|\\p{{N}}{{1,3}}{CASED_REST}",),
        False,
        f"{CASED_ALSO}{CONTRACTIONS_ALSO}?|{CASED_CAPITALS_ALSO}{CONTRACTIONS_ALSO}?|\\p{{N}}{{1,3}}{CASED_REST}",
    ),
)
WAY_OUT = (
    "take a base with one of these: " + ", ".join(known.name for known in KNOWN) + "; or one with a SentencePiece vocabulary"
)


def by_name(name: str) -> PreTokenizer:
    """Raises JobFailed where it is not in the table."""
    for known in KNOWN:
        if known.name == name:
            return known
    raise JobFailed(
        f"the pre-tokenizer {name!r} is not known here, training and serving would split text differently", hint=WAY_OUT
    )


def by_structure(described: dict[str, Any], whole_words: bool) -> PreTokenizer:
    """The table's row for the `pre_tokenizer` of a tokenizer.json.

    Raises:
        JobFailed: none has its steps.
    """
    steps = _steps(described)
    for known in KNOWN:
        if known.whole_words == whole_words and steps in (known.steps, (known.also,)):
            return known
    told = f"the pre-tokenizer {' + '.join(steps) or 'without a step'}{', whole words first' if whole_words else ''}"
    raise JobFailed(f"{told} is not known here, training and serving would split text differently", hint=WAY_OUT)


def build(known: PreTokenizer, tokens: Collection[str]) -> Any:
    """The pre-tokenizer of the package `tokenizers` that cuts as llama.cpp does.

    A byte that no token stands for is left out by both; llama.cpp does not merge across the place where it was.
    """
    from tokenizers import Regex, pre_tokenizers

    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=BYTES in known.steps)
    first = [
        pre_tokenizers.Digits(individual_digits=True) if step == DIGITS else pre_tokenizers.Split(Regex(step), "isolated")
        for step in known.steps
        if step != BYTES
    ]
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(tokens))
    gaps = [pre_tokenizers.Split(Regex(f"[{''.join(map(re.escape, missing))}]"), "removed")] if missing else []
    return pre_tokenizers.Sequence([*first, last, *gaps])


def _steps(described: dict[str, Any]) -> tuple[str, ...]:
    """The steps in words; the change of bytes to letters, which is always the last, is none of its own."""
    kind = described.get("type")
    if kind == "Sequence":
        return tuple(step for part in described["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not described.get("add_prefix_space"):
        return (BYTES,) if described.get("use_regex", True) else ()
    if kind == "Digits" and described.get("individual_digits"):
        return (DIGITS,)
    if kind == "Split":
        behavior = (described.get("behavior"), bool(described.get("invert")))
        if behavior in (("Isolated", False), ("Removed", True)) and "Regex" in described["pattern"]:
            return (str(described["pattern"]["Regex"]),)
    return (str(described),)
