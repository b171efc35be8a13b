"""Special text: a control token is parsed where the chat template put it, and never in what a person or a model wrote.

Training and serving keep to one rule. `mark` breaks the text of every control token inside a message, by a character of private
use; the template renders the marked messages; `split` cuts what is rendered at the control tokens that are left, which are the
template's, and takes the marks out again. A special part is its token; a text part is tokenized by itself, no control tokens
parsed. Where `mark` changes no message this gives the tokens of the whole text with control tokens parsed: llama.cpp, too,
tokenizes what stands between two of them by itself.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

MARK = "\U000ff5e7"  # doubled where a message has it itself
WHITE_SPACE = " \t\n\v\f\r"
UNKNOWN, CONTROL = 2, 3  # tokenizer.ggml.token_type
# What llama.cpp takes for a control token by its text, whatever type the file gives it: ends of turns, filling in the middle.
CONTROL_BY_NAME = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>"
    " _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>"
    " <turn|> <|tool_response> [e~[ <|ifm|im_end|> <｜end▁of▁sentence｜>"
    " <|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> <｜fim▁begin｜> <|plamo:fim_prefix|>"
    " <|fim_suffix|> <fim-suffix> <fim_suffix> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> <｜fim▁hole｜> <|plamo:fim_suffix|>"
    " <|fim_middle|> <fim-middle> <fim_middle> <MID> ▁<MID> <|code_middle|> <|middle|> <｜fim▁end｜> <|plamo:fim_middle|>"
    " <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>"
    " <|plamo:file_separator|>".split()
)
SHORTEST = 2  # characters; nothing can be put into a shorter token, which is text wherever it stands


def mark(content: str, specials: Collection[str]) -> str:
    """`content` with no special token's text in it; unchanged where there is none, the usual case."""
    marked, pattern = content.replace(MARK, 2 * MARK), _pattern(frozenset(specials))
    while pattern and pattern.search(marked):  # again: one that began inside another is left by the first time
        marked = pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], marked)
    return marked


def has_special(text: str, specials: Collection[str]) -> bool:
    """Whether the text of a special token is in it."""
    pattern = _pattern(frozenset(specials))
    return bool(pattern and pattern.search(text))


def split(rendered: str, specials: Collection[str], stripping: Collection[str] = ()) -> list[tuple[str, bool]]:
    """The parts of a prompt whose messages went through `mark`: text, and whether it is a special token; none is empty.

    Args:
        stripping: the special tokens that take the white space after them with them (see `stripping_of`).
    """
    pattern = _pattern(frozenset(specials))
    parts: list[tuple[str, bool]] = []
    strips = False
    for number, part in enumerate(pattern.split(rendered) if pattern else [rendered]):
        special = number % 2 == 1
        text = unmark(part.lstrip(WHITE_SPACE) if strips and not special else part)
        strips = special and part in stripping
        parts += [(text, special)] if text else []
    return parts


def unmark(text: str) -> str:
    """What was written, of a text with marks."""
    return re.sub(f"{MARK}({MARK}?)", r"\1", text)


def specials_of(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """The texts that llama.cpp parses only as special text, of `tokenizer.ggml.tokens` and their `tokenizer.ggml.token_type`."""
    return [token for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL) or token in CONTROL_BY_NAME]


def stripping_of(name: str, specials: Collection[str]) -> frozenset[str]:
    """The special tokens that llama.cpp strips the white space behind: it goes by the `general.name` of the model."""
    if not any(known in name.lower() for known in ("phi-3", "phi3")):
        return frozenset()
    return frozenset(specials) - {"<unk>", "<s>", "<|endoftext|>"}


@lru_cache(maxsize=64)
def _pattern(specials: frozenset[str]) -> re.Pattern[str] | None:
    """Matches the longest special token at a place, as a group, so that `re.split` keeps it."""
    words = [word for word in specials if len(word) >= SHORTEST]
    return re.compile(f"({_any_of(words)})") if words else None


def _any_of(words: Iterable[str]) -> str:
    """An expression for the longest of the words. It reads a letter once however many there are: Gemma 3 has 6,000."""
    rests: dict[str, list[str]] = {}
    ends = False
    for word in words:
        ends = ends or not word
        if word:
            rests.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in rests.items()]
    if len(branches) == 1 and not ends:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if ends else ''}" if branches else ""
