"""Weights of a base, read in rows. Nothing is mapped and no file stays open: in memory is only what was asked for.

Whatever a tensor is stored as (16 bits, or one of llama.cpp's quantized blocks), rows come as float32. Two threads may read
the same tensor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

from config.errors import JobFailed

Matrix = npt.NDArray[np.float32]

Kind: TypeAlias = gguf.GGMLQuantizationType
SAFETENSORS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LENGTH_BYTES = 8  # of a safetensors header, before it
COMPARED_VALUES = 2**22  # at once


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. `shape` is numpy's: (out, in) for the weight of a linear layer."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    kind: Kind

    @property
    def columns(self) -> int:
        return prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.columns, self.kind)

    def rows(self, first: int = 0, last: int | None = None) -> Matrix:
        """Rows `first` to `last` (all), of the tensor's own dimensions.

        Raises:
            JobFailed: the file ends before, or is stored in a way that the gguf package cannot read.
        """
        count = (self.shape[0] if last is None else last) - first
        raw = np.empty((count, self.row_bytes), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * self.row_bytes)
            filled = file.readinto(raw.data.cast("B"))
            while 0 < filled < raw.nbytes:  # a file system may give less than was asked for
                more = file.readinto(raw.data.cast("B")[filled:])
                filled = filled + more if more else -1
        if filled != raw.nbytes:
            raise JobFailed(f"{self.path}: ends in the middle of a tensor", hint="fetch the file again")
        return _float32(raw, self.kind, self.path).reshape(count, *self.shape[1:])


def row_bytes(columns: int, kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(columns // block * size)


def _float32(raw: npt.NDArray[np.uint8], kind: Kind, path: Path) -> Matrix:
    if kind in (Kind.BF16, Kind.F16):
        import torch  # numpy takes ten times as long

        half = torch.from_numpy(raw.view(np.int16))
        return np.asarray(half.view(torch.bfloat16 if kind is Kind.BF16 else torch.float16).float().numpy())
    try:
        return gguf.dequantize(raw, kind)
    except NotImplementedError as error:
        raise JobFailed(f"{path}: {kind.name} cannot be read here: {error}", hint="take the 16-bit weights as base") from error


def tensors_of(base: Path, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Every tensor of a GGUF file or of a Hugging Face folder, by its name in the file.

    Args:
        names: modules of transformers and their names in a GGUF: with these, what a GGUF has of them is called as there.

    Raises:
        JobFailed: no weights, or what cannot be read: says which file.
    """
    if not base.is_dir():
        modules = {stored: module for module, stored in (names or {}).items()}
        split = [(name.rpartition("."), tensor) for name, tensor in read_header(base).tensors.items()]
        return {f"{modules.get(stored, stored)}.{part}": tensor for (stored, _, part), tensor in split}
    found: dict[str, Tensor] = {}
    for path in _shards(base):
        found |= tensors_in(path)
    return found


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether both hold the same numbers. They are read in pieces, up to the first that differs."""
    if one.shape != other.shape:
        return False
    step = max(COMPARED_VALUES // one.columns, 1)
    pieces = ((first, min(first + step, one.shape[0])) for first in range(0, one.shape[0], step))
    return all(np.array_equal(one.rows(first, last), other.rows(first, last)) for first, last in pieces)


class Field(NamedTuple):
    value: Any
    types: list[gguf.GGUFValueType]  # of an array: ARRAY, then its elements' type


class Header(NamedTuple):
    """What stands before the weights of a GGUF, read whole: the file is not kept open."""

    fields: dict[str, Field]
    tensors: dict[str, Tensor]

    def value(self, key: str, default: Any) -> Any:
        return self.fields[key].value if key in self.fields else default


def read_header(path: Path) -> Header:
    """The header of a GGUF; the last one is remembered, since a long vocabulary takes seconds. Raises JobFailed."""
    try:
        found = path.stat()
        return _header(path, found.st_mtime_ns, found.st_size)
    except (OSError, ValueError, LookupError, OverflowError) as error:  # a file that is cut off gives the reader any of these
        raise JobFailed(
            f"{path}: not a whole GGUF file: {error}", hint="give a GGUF of a whole model, or a model's folder"
        ) from error


@lru_cache(maxsize=1)
def _header(path: Path, changed_ns: int, size: int) -> Header:
    reader = gguf.GGUFReader(path)
    own = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return Header({key: Field(field.contents(), list(field.types)) for key, field in own.items()}, _located(path, reader.tensors))


def _located(path: Path, listed: list[Any]) -> dict[str, Tensor]:
    return {
        tensor.name: Tensor(
            path, int(tensor.data_offset), tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type
        )
        for tensor in listed
    }


def _shards(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and not single.is_file():  # where both are, transformers takes the one file, so that is what is trained
        try:
            named = sorted({Path(name).name for name in _json(index.read_bytes(), index)["weight_map"].values()})
        except (AttributeError, KeyError, TypeError) as error:
            raise JobFailed(f"{index}: lists no shards", hint="fetch it again") from error
        paths = [folder / name for name in named]  # a name with folders in it leads nowhere
    else:
        paths = [single]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        hint = "a base has its weights as safetensors: fetch the whole folder, or convert its .bin files"
        raise JobFailed(f"{folder}: lacks {', '.join(missing)}", hint=hint)
    return paths


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises JobFailed: it is none, it is not whole, or its weights are of another kind."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > size:
            raise JobFailed(f"{path}: not a safetensors file", hint="fetch it again")
        header = _json(file.read(length), path)
    begin = LENGTH_BYTES + length
    try:
        return {name: _placed(path, name, said, begin, size) for name, said in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise JobFailed(f"{path}: not a safetensors file: {error!r}", hint="fetch it again") from error


def _placed(path: Path, name: str, said: Mapping[str, Any], begin: int, size: int) -> Tensor:
    """A tensor of a safetensors file of `size` bytes whose tensors begin at `begin`."""
    if said["dtype"] not in SAFETENSORS:
        raise JobFailed(f"{path}: {name} is stored as {said['dtype']}", hint="take weights of 16 or 32 bits")
    first, last = said["data_offsets"]
    tensor = Tensor(path, begin + first, tuple(said["shape"]), SAFETENSORS[said["dtype"]])
    if last - first != prod(tensor.shape) * row_bytes(1, tensor.kind):
        raise JobFailed(f"{path}: {name} has {last - first} bytes, which is not its shape {tensor.shape}", hint="fetch it again")
    if first < 0 or begin + last > size:
        raise JobFailed(f"{path}: ends before {name} does", hint="fetch it again: it is not whole")
    return tensor


def _json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise JobFailed(f"{path}: cannot be read: {error}", hint="fetch it again") from error
