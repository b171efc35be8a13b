"""Vocabulary: what llama.cpp is told of a tokenizer, read from a Hugging Face folder or from a GGUF.

- Training builds its tokenizer from this and from nothing else (`train/tokenizer.py`), so both sides split text alike.
- Two kinds: `gpt2`, byte pairs merged by rank within words, and `llama`, SentencePiece's pairs merged by score. Where a folder
  has no tokenizer.model, a piece's score is the rank of the first merge that makes it: the order that SentencePiece gave it.
- Every id up to the embedding's rows has a token; what the tokenizer does not know is unused. No two tokens have one text.
- A token that a template writes turns with is a control token, also where the tokenizer does not call it special: llama.cpp finds
  any other added token in what a person writes, too.
- What this cannot express (another model, an unknown pre-tokenizer or normalizer) is refused by name.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from config.errors import JobFailed
from trainer_node.export import sentencepiece
from trainer_node.export.pre_tokenizers import by_structure
from trainer_node.runtime.gguf_file import NotGguf, read_metadata
from trainer_node.special_text import CONTROL_BY_NAME

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (int(kind) for kind in gguf.TokenType)
BYTES = re.compile("<0x[0-9A-F]{2}>")
# What llama.cpp's converter takes for a control token by its looks; DeepSeek's roles are such.
LOOKS_LIKE_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<pad>|<mask>|<2mass>|\[@BOS@\]")
SPACE = "▁"
ROLES = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}  # and the key: tokenizer.ggml.…_token_id
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
WAY_OUT = "take a base with a byte-pair or a SentencePiece BPE tokenizer"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`, `types` and `scores` by id. `scores` of kind `llama` only, `merges` (by rank) and `pre` of kind `gpt2` only."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[Pair]
    roles: dict[str, int]  # bos, eos, eot, unk, pad: those it has
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    template: str


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Write the tokenizer and the chat template of a Hugging Face folder into a GGUF.

    Args:
        rows: rows of the model's embedding; the vocabulary is filled up to that.

    Raises:
        JobFailed: as `read_folder`.
    """
    write_vocabulary(writer, read_folder(folder, rows))


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """The `tokenizer.*` keys of a GGUF."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "llama":
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    for role, id_ in vocabulary.roles.items():
        writer.add_uint32(f"tokenizer.ggml.{ROLES[role]}_token_id", id_)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def read_folder(folder: Path, rows: int) -> Vocabulary:
    """Read tokenizer.json or tokenizer.model, with tokenizer_config.json and chat_template.jinja beside it.

    Raises:
        JobFailed: none is there or readable, more tokens than rows, or one that llama.cpp would read otherwise; says which.
    """
    try:
        files = _Files.read(folder)
        return _Reader(files, rows).read()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        told = f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}"
        raise JobFailed(told, hint="is the folder whole? it needs tokenizer.json or tokenizer.model") from error
    except JobFailed as error:
        raise JobFailed(f"{folder}: {error}", hint=error.hint) from error


def read_gguf_vocabulary(path: Path) -> Vocabulary:
    """Read the `tokenizer.*` keys of a GGUF.

    Raises:
        JobFailed: no GGUF, a broken vocabulary, or a kind that is not known here.
    """
    try:
        keys = read_metadata(path)
    except (OSError, NotGguf) as error:
        raise JobFailed(f"{path}: {error}", hint="give the path of a GGUF file") from error

    def value(key: str, default: Any = None) -> Any:
        return keys.get(f"tokenizer.ggml.{key}", default)

    kind, pre = str(value("model", "")), str(value("pre", "default"))
    if kind not in ("gpt2", "llama"):
        raise JobFailed(f"{path}: its vocabulary is of the kind {kind!r}, which is not known here", hint=WAY_OUT)
    tokens, spm = value("tokens", []), kind == "llama"
    types = value("token_type", [NORMAL] * len(tokens))
    scores = value("scores", [0.0] * len(tokens)) if spm else []
    roles = {role: int(id_) for role, key in ROLES.items() if (id_ := value(f"{key}_token_id")) is not None}
    if (
        len(types) != len(tokens)
        or (spm and len(scores) != len(tokens))
        or not all(0 <= id_ < len(tokens) for id_ in roles.values())
    ):
        told = f"{len(tokens)} tokens, {len(types)} types, {len(scores)} scores, and the ids {roles}"
        raise JobFailed(f"{path}: its vocabulary is broken: {told}", hint="fetch or convert the file again")
    template = str(keys.get("tokenizer.chat_template", ""))
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=[CONTROL if token in CONTROL_BY_NAME else type_ for token, type_ in zip(tokens, types, strict=True)],
        scores=scores,
        merges=[] if spm else [_pair(merge) for merge in value("merges", [])],
        roles=_end_of_turn({token: id_ for id_, token in enumerate(tokens)}, template, roles) | roles,
        add_bos=bool(value("add_bos_token", spm or pre in ("llama-bpe", "tekken"))),
        add_eos=bool(value("add_eos_token", False)),
        add_space_prefix=spm and bool(value("add_space_prefix", True)),
        template=template,
    )


def _end_of_turn(ids: dict[str, int], template: str, roles: dict[str, int]) -> dict[str, int]:
    """The role `eot`, where the template ends a turn with another token than the end token. Few files say so themselves."""
    end = next((ids[text] for text in ENDS_OF_TURN if text in ids and text in template), None)
    return {} if end is None or end == roles.get("eos") else {"eot": end}


def _pair(merge: str) -> Pair:
    left, _, right = merge[1:].partition(" ")  # a piece may begin with a blank, none has one inside
    return merge[:1] + left, right


@dataclass(frozen=True)
class _Files:
    """What lies in the folder, parsed."""

    tokenizer: dict[str, Any]  # tokenizer.json, {} without one
    pieces: sentencepiece.Pieces | None  # tokenizer.model, where it has a say: beside byte pairs it may be of any format
    added: dict[str, Any]  # added_tokens.json, which older versions of transformers wrote
    config: dict[str, Any]  # tokenizer_config.json, with special_tokens_map.json under it
    model: dict[str, Any]  # config.json
    template: str

    @classmethod
    def read(cls, folder: Path) -> "_Files":
        def parsed(name: str) -> dict[str, Any]:
            path = folder / name
            return dict(json.loads(path.read_bytes())) if path.exists() else {}

        config = parsed("special_tokens_map.json") | parsed("tokenizer_config.json")
        tokenizer, proto = parsed("tokenizer.json"), folder / "tokenizer.model"
        spm = not tokenizer or tokenizer["model"].get("byte_fallback")
        pieces = sentencepiece.read(proto) if spm and proto.exists() else None
        if not tokenizer and pieces is None:
            raise JobFailed("has neither tokenizer.json nor tokenizer.model", hint="fetch the whole repository of the model")
        jinja = folder / "chat_template.jinja"
        template = jinja.read_text(encoding="utf-8") if jinja.exists() else _template(config.get("chat_template"))
        return cls(tokenizer, pieces, parsed("added_tokens.json"), config, parsed("config.json"), template)


def _template(written: Any) -> str:
    """A tokenizer_config.json has one template, or a list of named ones."""
    named = {entry["name"]: entry["template"] for entry in written} if isinstance(written, list) else {"default": written}
    return str(named.get("default") or "")


@dataclass
class _Reader:
    files: _Files
    rows: int
    by_id: dict[int, tuple[str, int]] = field(default_factory=dict)  # token and type

    def read(self) -> Vocabulary:
        model = self.files.tokenizer.get("model", {"type": "BPE", "byte_fallback": True})
        if model.get("type") != "BPE":
            raise JobFailed(f"a tokenizer of the type {model.get('type')!r} is not known here", hint=WAY_OUT)
        spm = bool(model.get("byte_fallback"))
        cut = self.files.tokenizer.get("pre_tokenizer") or {}
        if spm:
            _require_uncut(cut)
        pre = "default" if spm else by_structure(cut, bool(model.get("ignore_merges"))).name
        _require_normalizer(self.files.tokenizer.get("normalizer"), spm)
        if not self.files.tokenizer and self.files.pieces is not None and self.files.pieces.normalizes:
            raise JobFailed("its tokenizer.model changes text before it splits it, llama.cpp does not", hint=WAY_OUT)
        merges = [tuple(merge) if isinstance(merge, list) else _pair(merge) for merge in model.get("merges", [])]
        self._tokens(model, spm)
        tokens = [self.by_id.get(id_, (f"[PAD{id_}]", UNUSED)) for id_ in range(self.rows)]
        roles = self._roles()
        return Vocabulary(
            kind="llama" if spm else "gpt2",
            pre=pre,
            tokens=[token for token, _ in tokens],
            types=[kind for _, kind in tokens],
            scores=self._scores(merges) if spm else [],
            merges=[] if spm else merges,
            roles=roles,
            add_bos="bos" in roles and self._adds_bos(),
            add_eos=False,  # whatever the config says: it means texts to learn from, a server would end every prompt with it
            add_space_prefix=spm and self._adds_space(),
            template=self.files.template,
        )

    def _tokens(self, model: dict[str, Any], spm: bool) -> None:
        """From the vocabulary, then from what was added to it, which counts."""
        if self.files.pieces is not None:
            self.by_id = {id_: (piece.text, piece.kind) for id_, piece in enumerate(self.files.pieces.pieces)}
        for token, id_ in model.get("vocab", {}).items():
            self.by_id.setdefault(id_, (token, BYTE if spm and BYTES.fullmatch(token) else NORMAL))
        for token, id_, special in self._added():
            if id_ >= self.rows and not self._is_used(token):
                continue  # Gemma 3's tokenizer has a token of its larger models: no text is read as it here
            control = special or token in CONTROL_BY_NAME or LOOKS_LIKE_CONTROL.fullmatch(token)
            known_as = self.by_id.get(id_, ("", NORMAL))[1]
            self.by_id[id_] = (token, UNKNOWN if known_as == UNKNOWN else CONTROL if control else USER_DEFINED)
        unknown = model.get("unk_token") if spm else None
        for id_, (token, kind) in self.by_id.items():
            if token == unknown:
                self.by_id[id_] = (token, UNKNOWN)
            elif kind == USER_DEFINED and spm:  # llama.cpp looks for these in the text as it is written
                self.by_id[id_] = (token.replace(SPACE, " "), kind)
        if max(self.by_id) >= self.rows:
            raise JobFailed(f"its tokenizer has ids up to {max(self.by_id)}, the embedding {self.rows} rows", hint=WAY_OUT)
        if len({token for token, _ in self.by_id.values()}) < len(self.by_id):
            raise JobFailed("two of its tokens have the same text, which llama.cpp refuses", hint=WAY_OUT)

    def _added(self) -> Iterable[tuple[str, int, bool]]:
        """Token, id and whether it is called special."""
        added = {int(entry["id"]): entry for entry in self.files.tokenizer.get("added_tokens", [])}
        if not self.files.tokenizer:
            special = {_content(named) for value in self.files.config.values() for named in _listed(value)}
            added = {int(id_): {"content": token, "special": token in special} for token, id_ in self.files.added.items()}
            added |= {int(id_): entry for id_, entry in self.files.config.get("added_tokens_decoder", {}).items()}
        return [(str(entry["content"]), id_, bool(entry.get("special"))) for id_, entry in sorted(added.items())]

    def _is_used(self, token: str) -> bool:
        return token in self.files.template or token in map(self._named, ROLES)

    def _named(self, role: str) -> str | None:
        return _content(self.files.config.get(f"{role}_token"))

    def _scores(self, merges: list[Pair]) -> list[float]:
        """Of a piece that no merge makes nothing is asked: the lowest."""
        if self.files.pieces is not None:
            known = [piece.score for piece in self.files.pieces.pieces][: self.rows]
            return known + [min(known) - 1.0] * (self.rows - len(known))
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        return [-float(ranks.get(self.by_id.get(id_, ("", 0))[0], len(merges))) for id_ in range(self.rows)]

    def _roles(self) -> dict[str, int]:
        ids = {token: id_ for id_, (token, _) in self.by_id.items()}
        roles = {role: ids[text] for role in ROLES if (text := self._named(role)) in ids and text}
        for role in ("bos", "eos"):
            configured = self.files.model.get(f"{role}_token_id")
            has_none = role == "bos" and "bos_token" in self.files.config
            if role not in roles and configured is not None and not has_none:
                roles[role] = int(configured[0] if isinstance(configured, list) else configured)
        return _end_of_turn(ids, self.files.template, roles) | roles

    def _adds_bos(self) -> bool:
        """What the config says, else what the tokenizer itself does."""
        said = self.files.config.get("add_bos_token")
        if said is not None:
            return bool(said)
        if not self.files.tokenizer:
            return True
        made = _single(self.files.tokenizer.get("post_processor"))
        return bool(made) and "SpecialToken" in made[0]

    def _adds_space(self) -> bool:
        if not self.files.tokenizer:
            assert self.files.pieces is not None
            return bool(self.files.config.get("add_prefix_space", self.files.pieces.add_space_prefix))
        pre = self.files.tokenizer.get("pre_tokenizer") or {}
        if pre.get("type") == "Metaspace":
            return pre.get("prepend_scheme", "always") != "never" and bool(pre.get("add_prefix_space", True))
        return any(step["type"] == "Prepend" for step in _normalizers(self.files.tokenizer.get("normalizer")))


def _content(named: Any) -> str | None:
    """A token of a config is written as its text, or with its text."""
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _single(described: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What a post-processor makes of one text."""
    if not described:
        return []
    if described["type"] == "Sequence":
        return [entry for part in described["processors"] for entry in _single(part)]
    return list(described["single"]) if described["type"] == "TemplateProcessing" else []


def _require_uncut(described: dict[str, Any]) -> None:
    """llama.cpp cuts nothing before it merges pieces. Spaces have been replaced by then, so that to split at one is nothing."""
    at_spaces = described.get("type") == "Split" and described["pattern"].get("String") == " "
    if described and not at_spaces and described["type"] != "Metaspace":
        raise JobFailed(f"its tokenizer cuts text by {described['type']} before it merges, llama.cpp does not", hint=WAY_OUT)


def _require_normalizer(described: dict[str, Any] | None, spm: bool) -> None:
    """llama.cpp normalizes nothing but SentencePiece's spaces. NFC is left away in training, too."""
    for step in _normalizers(described):
        replaces_space = step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] == SPACE
        prepends_space = step["type"] == "Prepend" and step["prepend"] == SPACE
        if not (replaces_space or prepends_space if spm else step["type"] == "NFC"):
            raise JobFailed(f"its tokenizer changes text by {step['type']}, llama.cpp does not", hint=WAY_OUT)


def _normalizers(described: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not described:
        return []
    return list(described["normalizers"]) if described["type"] == "Sequence" else [described]
