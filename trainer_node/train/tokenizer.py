"""The tokenizer that training uses: built from what llama.cpp is told, so that it splits text as llama.cpp does.

A tokenizer.json is not taken as it is, nor what transformers makes of a GGUF: both normalize or split in ways that llama.cpp does
not know (NFC; white space before digits; a space only before the first part), and what is served counts.
"""

from dataclasses import dataclass
from typing import Any

from config.errors import JobFailed
from trainer_node.export import pre_tokenizers
from trainer_node.export.vocabulary import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Pair, Vocabulary
from trainer_node.special_text import SHORTEST, specials_of, stripping_of

LEAD = "\U000ff5e8"  # a character that no piece holds: of private use, so four bytes to every vocabulary


@dataclass(frozen=True)
class Rules:
    """What `train/encode.py` has to know beside the tokenizer itself, which carries it as `rules`."""

    special: dict[str, int]  # control tokens: text and id
    texts: frozenset[str]  # the same, to look for
    stripping: frozenset[str]  # those that take the white space after them
    bos: str  # what every prompt begins with; "": nothing
    eos: str  # what a template is told is the end token; the tokenizer's own ends a turn
    prefixes_space: bool


def build_tokenizer(vocabulary: Vocabulary, name: str) -> Any:
    """A `PreTrainedTokenizerFast` with the base's chat template and `rules`; its `eos_token` ends a turn, and does not pad.

    Args:
        name: of the model, as its GGUF is called.

    Raises:
        JobFailed: a pre-tokenizer that is not known here, no chat template, no end token or one that ends every prompt, or a
            control token that ordinary text is merged into.
    """
    from transformers import PreTrainedTokenizerFast

    roles = {role: vocabulary.tokens[id_] for role, id_ in vocabulary.roles.items()}
    if not vocabulary.template or "eos" not in roles:
        raise JobFailed("the base has no chat template or no end token", hint="take an instruct model as base")
    if vocabulary.add_eos:
        told = "a server would put the end token behind every prompt of this base (tokenizer.ggml.add_eos_token)"
        raise JobFailed(told, hint="take another GGUF of the same model, or the model as a Hugging Face folder")
    special = specials_of(vocabulary.tokens, vocabulary.types)
    end = roles.get("eot", roles["eos"])
    if roles.get("pad", end) == end:
        roles["pad"] = next((token for token in [roles.get("unk"), *special] if token and token != end), end)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(vocabulary),
        clean_up_tokenization_spaces=False,
        chat_template=vocabulary.template,
        eos_token=end,
        **{f"{role}_token": roles[role] for role in ("bos", "unk", "pad") if role in roles},
    )
    ids = _ids(vocabulary)
    tokenizer.rules = Rules(
        special={token: ids[token] for token in special},
        texts=frozenset(special),
        stripping=stripping_of(name, special),
        bos=roles["bos"] if vocabulary.add_bos and "bos" in roles else "",
        eos=roles["eos"],
        prefixes_space=vocabulary.add_space_prefix,
    )
    _require_unforgeable(tokenizer, spm=vocabulary.kind == "llama")
    return tokenizer


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of what somebody wrote: no control tokens parsed, none added."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _require_unforgeable(tokenizer: Any, *, spm: bool) -> None:
    """Of SentencePiece's pieces llama.cpp merges a pair into any token of that text, into a control token, too."""
    lead = LEAD if spm else ""  # else a space would be merged with what follows
    before = len(plain_ids(tokenizer, lead))
    for text, id_ in tokenizer.rules.special.items():
        ids = plain_ids(tokenizer, lead + text)[before:] if len(text) >= SHORTEST else []
        if id_ in ids or (spm and len(ids) == 2):
            told = f"ordinary text is merged into its control token {text!r}, so that anybody could write one"
            raise JobFailed(told, hint="take another base: this one cannot be served safely")


def _backend(vocabulary: Vocabulary) -> Any:
    from tokenizers import AddedToken, decoders

    tokenizer = _sentencepiece(vocabulary) if vocabulary.kind == "llama" else _byte_pairs(vocabulary)
    if vocabulary.kind == "gpt2":
        tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _byte_pairs(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, models

    known = pre_tokenizers.by_name(vocabulary.pre)
    model = models.BPE(_ids(vocabulary), vocabulary.merges, ignore_merges=known.whole_words)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.build(known, vocabulary.tokens)
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = next((token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == UNKNOWN), None)
    model = models.BPE(_ids(vocabulary), merges_by_score(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    words: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        words.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(words)
    return tokenizer


def merges_by_score(vocabulary: Vocabulary) -> list[Pair]:
    """Every pair of pieces that makes a piece, the piece with the best score first, which is SentencePiece's way to merge."""
    ids = {token: id_ for id_, token in enumerate(vocabulary.tokens) if vocabulary.types[id_] == NORMAL}
    order = sorted(ids, key=lambda token: (-vocabulary.scores[ids[token]], ids[token]))
    return [
        (token[:cut], token[cut:]) for token in order for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids
    ]


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(vocabulary.tokens)}
