"""tokenizer.model: the pieces of a SentencePiece model with their scores, read from its protobuf without SentencePiece.

The fields that are read (sentencepiece_model.proto): ModelProto 1 pieces, 2 trainer_spec, 3 normalizer_spec; of a piece 1 text,
2 score, 3 type, whose numbers are GGUF's; of trainer_spec 3 model_type; of normalizer_spec 2 precompiled_charsmap,
3 add_dummy_prefix, 4 remove_extra_whitespaces.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import JobFailed

NORMAL = 1
BPE = 2
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Pieces(NamedTuple):
    pieces: list[Piece]
    add_space_prefix: bool
    normalizes: bool  # letters or white space


def read(path: Path) -> Pieces:
    """Raises JobFailed where it is no model or none that merges pairs; OSError."""
    pieces, model_type, prefix, normalizes = [], 1, True, False
    try:
        for number, value in _fields(path.read_bytes()):
            inner = dict(_fields(value)) if isinstance(value, bytes) else {}
            if number == 1:
                (score,) = struct.unpack("<f", inner.get(2, b"\0\0\0\0"))
                pieces.append(Piece(inner[1].decode(), score, inner.get(3, NORMAL)))
            elif number == 2:
                model_type = inner.get(3, model_type)
            elif number == 3:
                prefix = bool(inner.get(3, True))
                normalizes = bool(inner.get(2)) or bool(inner.get(4, True))
    except (IndexError, KeyError, ValueError, AttributeError, struct.error) as error:
        raise JobFailed(f"{path.name} is no SentencePiece model: {error}", hint="fetch the file again") from error
    if model_type != BPE:
        raise JobFailed(
            f"{path.name} is no SentencePiece model of the type BPE", hint="take a base whose tokenizer merges pairs (BPE)"
        )
    return Pieces(pieces, prefix, normalizes)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an integer for a varint, else its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(kind, 0)
        if kind == LENGTH:
            length, at = _varint(data, at)
        elif not length:
            raise ValueError(f"a field of the kind {kind}")
        if at + length > len(data):
            raise ValueError("it ends in the middle")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
