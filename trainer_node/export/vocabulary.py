"""Vocabulary: what llama.cpp is told of a tokenizer, read from a Hugging Face folder or from a GGUF.

- Training builds its tokenizer from this and from nothing else (`train/tokenizer.py`), so both sides split text alike.
- Two kinds: `gpt2`, byte pairs merged by rank within words, and `llama`, SentencePiece's pairs merged by score. Where a folder
  has no tokenizer.model, a piece's score is the rank of the first merge that makes it: the order that SentencePiece gave it.
- Every id up to the embedding's rows has a token; what the tokenizer does not know is unused. No two tokens have one text.
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
    found = read_folder(folder, rows)
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.kind == "llama":
        writer.add_token_scores(found.scores)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in found.merges])
    for role, id_ in found.roles.items():
        writer.add_uint32(f"tokenizer.ggml.{ROLES[role]}_token_id", id_)
    writer.add_add_bos_token(found.add_bos)
    writer.add_add_eos_token(found.add_eos)
    writer.add_add_space_prefix(found.add_space_prefix)
    if found.template:
        writer.add_chat_template(found.template)


def read_folder(folder: Path, rows: int) -> Vocabulary:
    """Read tokenizer.json or tokenizer.model, with tokenizer_config.json and chat_template.jinja beside it.

    Raises:
        JobFailed: none is there or readable, more tokens than rows, or one that llama.cpp would read otherwise; says which.
    """
    try:
        files = _Files.read(folder)
        return _Reader(files, rows).read()
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}"
        raise JobFailed(told, hint="is the folder whole? it needs tokenizer.json or tokenizer.model") from error
    except JobFailed as error:
        raise JobFailed(f"{folder}: {error}", hint=error.hint) from error


def read_gguf_vocabulary(path: Path) -> Vocabulary:
    """Read the `tokenizer.*` keys of a GGUF.

    Raises:
        JobFailed: no GGUF, or a kind of vocabulary that is not known here.
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
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=[CONTROL if token in CONTROL_BY_NAME else type_ for token, type_ in zip(tokens, types, strict=True)],
        scores=value("scores", [0.0] * len(tokens)) if spm else [],
        merges=[] if spm else [_pair(merge) for merge in value("merges", [])],
        roles={role: int(id_) for role, key in ROLES.items() if (id_ := value(f"{key}_token_id")) is not None},
        add_bos=bool(value("add_bos_token", spm or pre in ("llama-bpe", "tekken"))),
        add_eos=bool(value("add_eos_token", False)),
        add_space_prefix=bool(value("add_space_prefix", spm)),
        template=str(keys.get("tokenizer.chat_template", "")),
    )


def _pair(merge: str) -> Pair:
    left, _, right = merge[1:].partition(" ")  # a piece may begin with a blank, none has one inside
    return merge[0] + left, right


@dataclass(frozen=True)
class _Files:
    """What lies in the folder, parsed."""

    tokenizer: dict[str, Any]  # tokenizer.json, {} without one
    pieces: sentencepiece.Pieces | None  # tokenizer.model
    config: dict[str, Any]  # tokenizer_config.json, with special_tokens_map.json under it
    model: dict[str, Any]  # config.json
    template: str

    @classmethod
    def read(cls, folder: Path) -> "_Files":
        def parsed(name: str) -> dict[str, Any]:
            path = folder / name
            return dict(json.loads(path.read_bytes())) if path.exists() else {}

        config = parsed("special_tokens_map.json") | parsed("tokenizer_config.json")
        proto = folder / "tokenizer.model"
        pieces = sentencepiece.read(proto) if proto.exists() else None
        tokenizer = parsed("tokenizer.json")
        if not tokenizer and pieces is None:
            raise JobFailed("has neither tokenizer.json nor tokenizer.model", hint="fetch the whole repository of the model")
        jinja = folder / "chat_template.jinja"
        template = jinja.read_text(encoding="utf-8") if jinja.exists() else _template(config.get("chat_template"))
        return cls(tokenizer, pieces, config, parsed("config.json"), template)


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
        pre = "default" if spm else by_structure(self.files.tokenizer["pre_tokenizer"], bool(model.get("ignore_merges"))).name
        _require_normalizer(self.files.tokenizer.get("normalizer"), spm)
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
            add_bos="bos" in roles and self._adds("bos"),
            add_eos="eos" in roles and self._adds("eos"),
            add_space_prefix=spm and self._adds_space(),
            template=self.files.template,
        )

    def _tokens(self, model: dict[str, Any], spm: bool) -> None:
        """From the vocabulary, then from what was added to it, which counts."""
        pieces = self.files.pieces if spm else None
        if pieces is not None:
            self.by_id = {id_: (piece.text, piece.kind) for id_, piece in enumerate(pieces.pieces)}
        for token, id_ in model.get("vocab", {}).items():
            self.by_id.setdefault(id_, (token, BYTE if spm and BYTES.fullmatch(token) else NORMAL))
        for token, id_, special in self._added():
            self.by_id[id_] = (token, CONTROL if special or token in CONTROL_BY_NAME else USER_DEFINED)
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
        added = {int(entry["id"]): entry for entry in self.files.tokenizer.get("added_tokens", [])}
        if not self.files.tokenizer:
            added = {int(id_): entry for id_, entry in self.files.config.get("added_tokens_decoder", {}).items()}
        return [(str(entry["content"]), id_, bool(entry.get("special"))) for id_, entry in sorted(added.items())]

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
        roles = {}
        for role in ("bos", "eos", "unk", "pad"):
            written = self.files.config.get(f"{role}_token")
            text = written.get("content") if isinstance(written, dict) else written
            if text in ids:
                roles[role] = ids[text]
        configured = self.files.model.get("eos_token_id")
        if "eos" not in roles and configured is not None:
            roles["eos"] = int(configured[0] if isinstance(configured, list) else configured)
        eot = next((ids[end] for end in ENDS_OF_TURN if end in ids and end in self.files.template), None)
        if eot is not None and eot != roles.get("eos"):
            roles["eot"] = eot
        return roles

    def _adds(self, role: str) -> bool:
        """What the config says, else what the tokenizer itself does."""
        said = self.files.config.get(f"add_{role}_token")
        if said is not None:
            return bool(said)
        if not self.files.tokenizer:
            return role == "bos"
        first_or_last = [entry for entry in _single(self.files.tokenizer.get("post_processor")) if entry]
        end = 0 if role == "bos" else -1
        return bool(first_or_last) and "SpecialToken" in first_or_last[end]

    def _adds_space(self) -> bool:
        if not self.files.tokenizer:
            assert self.files.pieces is not None
            return bool(self.files.config.get("add_prefix_space", self.files.pieces.add_space_prefix))
        pre = self.files.tokenizer.get("pre_tokenizer") or {}
        if pre.get("type") == "Metaspace":
            return pre.get("prepend_scheme", "always") != "never"
        return any(step["type"] == "Prepend" for step in _normalizers(self.files.tokenizer.get("normalizer")))


def _single(described: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What a post-processor makes of one text."""
    if not described:
        return []
    if described["type"] == "Sequence":
        return [entry for part in described["processors"] for entry in _single(part)]
    return list(described["single"]) if described["type"] == "TemplateProcessing" else []


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
