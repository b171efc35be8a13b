"""The header of a GGUF file: metadata and the list of tensors, never their data.

Every length and offset is checked against the size of the file before it is used. Arrays (vocabularies, merges) are stepped over:
`gguf.GGUFReader` reads them into objects, which takes seconds for a real vocabulary. `read_vocabulary` reads the two of them that
say which texts are control tokens.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

# GGUF's value types as struct formats
SCALARS = dict(zip(range(13), ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d"), strict=True))
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4  # of a tensor, in llama.cpp
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


T = TypeVar("T")


class NotGguf(ValueError):
    """The file is no GGUF, or not whole. The message says which in the words of Ollama."""


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    type: str  # F32, Q4_1, …
    end: int  # bytes, from the start of the file


@dataclass(frozen=True)
class GgufFile:
    """`metadata` holds None for every array."""

    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def is_adapter(self) -> bool:
        return self.metadata.get("general.type") == "adapter"

    @property
    def parameter_count(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def file_type(self) -> str:
        """The quantization as people call it: F16, Q8_0, Q4_K_M."""
        try:
            name = str(LlamaFileType(self.metadata.get("general.file_type")).name)
        except ValueError:
            return "unknown"
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")

    def length(self, key: str) -> int:
        """`<architecture>.<key>`, such as context_length; 0 if absent, or no number."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return int(value) if isinstance(value, int | float) and isfinite(value) else 0


@dataclass(frozen=True)
class Vocabulary:
    """`name`: `general.name`; a token's id is its place in `tokens`, `types` are llama.cpp's; both empty if the file has none."""

    name: str
    tokens: list[str]
    types: list[int]


def read_gguf(path: Path) -> GgufFile:
    """Raises NotGguf for junk and for a file whose tensors reach beyond its end; OSError if it cannot be opened."""
    return _mapped(path, _read)


def read_vocabulary(path: Path) -> Vocabulary:
    """Raises NotGguf for junk; OSError if it cannot be opened."""
    return _mapped(path, _read_vocabulary)


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key with its value, lists among them. Raises NotGguf for junk; OSError if it cannot be opened."""
    return _mapped(path, _read_metadata)


def _mapped(path: Path, read: "Callable[[_Cursor], T]") -> T:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise NotGguf("supplied file was not in GGUF format")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return read(_Cursor(data))
            except NotGguf:
                raise
            except (struct.error, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
                raise NotGguf(f"unexpected end or broken header of the GGUF file: {error}") from error


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise NotGguf("unexpected EOF")
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        self.skip_array()
        return None

    def skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind not in (STRING, ARRAY):
            self.at += count * struct.calcsize(SCALARS[kind])
            return
        for _ in range(count):
            if kind == STRING:
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
            else:
                self.skip_array()

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise NotGguf("unexpected EOF")
        return [self.value(kind) for _ in range(count)]


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Of tensors and of keys."""
    version, tensor_count, key_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise NotGguf(f"unsupported GGUF version {version}")
    return tensor_count, key_count


def _read_metadata(cursor: _Cursor) -> dict[str, Any]:
    _, key_count = _counts(cursor)
    found: dict[str, Any] = {}
    for _ in range(key_count):
        key, kind = cursor.string(), cursor.number("I")
        found[key] = cursor.array() if kind == ARRAY else cursor.value(kind)
    return found


def _read_vocabulary(cursor: _Cursor) -> Vocabulary:
    found: dict[str, Any] = {}
    _, key_count = _counts(cursor)
    for _ in range(key_count):
        key = cursor.string()
        kind = cursor.number("I")
        found[key] = cursor.array() if key in (TOKENS, TOKEN_TYPES) and kind == ARRAY else cursor.value(kind)
    tokens, types = found.get(TOKENS) or [], found.get(TOKEN_TYPES) or []
    whole = len(tokens) == len(types)
    return Vocabulary(str(found.get("general.name") or ""), tokens if whole else [], types if whole else [])


def _read(cursor: _Cursor) -> GgufFile:
    tensor_count, key_count = _counts(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    headers = [_tensor_header(cursor) for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.at // alignment) * alignment
    tensors = tuple(_tensor(start, len(cursor.data), *header) for header in headers)
    return GgufFile(metadata, tensors)


def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.string(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise NotGguf(f'tensor "{name}" has {dimensions} dimensions')
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    return name, shape, cursor.number("I"), cursor.number("Q")


def _tensor(start: int, file_size: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    quantization = GGMLQuantizationType(kind)
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    end = start + offset + prod(shape) // block * block_bytes
    if end > file_size:
        raise NotGguf(f'tensor "{name}" offset+size ({end}) exceeds file size ({file_size})')
    return Tensor(name, shape, quantization.name, end)
