"""Quantizing: a GGUF of 16 bits into a smaller one, by the best quantizer of this machine. What was really made is what is told.

First that is there: the llama-quantize that Ollama carries, one on PATH, llama-cpp-python, and the gguf package, which makes
Q8_0, Q5_1 and Q4_0 alone. Where it stands in for another kind, that is said before anything is made, and no file is ever called
what it is not. The target is whole or not there.
"""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import gguf
import numpy as np
import numpy.typing as npt

from config.errors import JobFailed, translate_os_errors
from trainer_node.export.weights import Kind, Tensor, row_bytes, tensors_of
from trainer_node.export.writing import Told, in_order, whole_file

log = logging.getLogger("hafs")

PROGRAM = "llama-quantize.exe" if sys.platform == "win32" else "llama-quantize"
PYTHON = "gguf"
BINDING = "llama_cpp"
MADE_IN_PYTHON = {"Q8_0": Kind.Q8_0, "Q5_1": Kind.Q5_1, "Q4_0": Kind.Q4_0}
STANDS_IN = {  # for what the gguf package cannot make: of about the same size
    "Q6_K": "Q8_0",
    "Q5_K_M": "Q5_1",
    "Q5_K_S": "Q5_1",
    "Q4_K_M": "Q4_0",
    "Q4_K_S": "Q4_0",
    "Q3_K_M": "Q4_0",
    "Q2_K": "Q4_0",
}
BITS = {  # of a weight, about: for the room on the disk
    "F16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.6,
    "Q5_1": 6.0,
    "Q5_K_M": 5.7,
    "Q5_K_S": 5.6,
    "Q4_K_M": 4.9,
    "Q4_K_S": 4.7,
    "Q4_0": 4.6,
    "Q3_K_M": 4.0,
    "Q2_K": 3.2,
}
KEPT_LARGER = ("output.weight", "token_embd.weight")  # llama.cpp keeps them at six bits; eight are the nearest that Python makes
PIECE_VALUES = 2**20
PART = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")  # [  17/ 272]   blk.1.attn_q.weight - …
TAIL_CHARACTERS = 500


@dataclass(frozen=True)
class Choice:
    """Who will quantize, and to what. `note` is not empty where that is not what was asked for."""

    name: str
    makes: str
    program: Path | None = None
    note: str = ""


def choose(kind: str) -> Choice:
    """The quantizer of this machine for `kind`, as llama.cpp names it."""
    for program in (*_of_ollama(), *_on_path()):
        return Choice(f"llama-quantize ({program})", kind, program)
    if importlib.util.find_spec(BINDING) is not None:
        return Choice("llama-cpp-python", kind)
    made = kind if kind in MADE_IN_PYTHON else STANDS_IN[kind]
    note = f"{made} stands in for {kind}: this machine has no llama-quantize, which alone makes that" if made != kind else ""
    return Choice(f"gguf {gguf_version()}", made, note=note)


def quantize(source: Path, target: Path, kind: str, told: Told) -> str:
    """Write `source` (F16 or F32) as `target`.

    Args:
        kind: as llama.cpp names it. What the first quantizer there makes of it says `choose`.
        told: told bytes of the source done and in all.

    Returns:
        The quantizer that was used.

    Raises:
        JobFailed: the quantizer failed.
        DiskFull, StoreError: the target cannot be written.
    """
    choice = choose(kind)
    if choice.note:
        log.warning(choice.note)
    size = source.stat().st_size
    with whole_file(target, int(size * BITS[choice.makes] / 16)) as file:
        if choice.program is not None:
            _run(choice.program, source, file, choice.makes, lambda share: told(int(size * share), size))
        elif choice.name == "llama-cpp-python":
            _bind(source, file, choice.makes)
        else:
            _quantize_here(source, file, MADE_IN_PYTHON[choice.makes], told)
        told(size, size)
    return choice.name


def gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _of_ollama() -> Iterator[Path]:
    """Beside Ollama's program, and where its installers put it."""
    program = shutil.which("ollama")
    folders = [Path(program).resolve().parent.parent / "lib" / "ollama"] if program else []
    if sys.platform == "win32":
        folders.append(Path(os.environ.get("LOCALAPPDATA", "")) / "Programs" / "Ollama" / "lib" / "ollama")
    elif sys.platform == "darwin":
        folders.append(Path("/Applications/Ollama.app/Contents/Resources"))
    folders += [Path("/usr/local/lib/ollama"), Path("/usr/lib/ollama")]
    return (folder / PROGRAM for folder in folders if os.access(folder / PROGRAM, os.X_OK))


def _on_path() -> Iterator[Path]:
    found = shutil.which(PROGRAM)
    return iter([Path(found)] if found else [])


def _run(program: Path, source: Path, target: Path, kind: str, on_share: Callable[[float], None]) -> None:
    """llama-quantize says which tensor it is at; what `on_share` raises ends it."""
    argv = [str(program), str(source), str(target), kind]
    with translate_os_errors(program):
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    said = ""
    try:
        for line in child.stdout:
            said = (said + line.decode(errors="replace"))[-TAIL_CHARACTERS:]
            if match := PART.search(line.decode(errors="replace")):
                on_share(int(match[1]) / int(match[2]))
        code = child.wait()
    finally:
        child.stdout.close()
        child.kill()
        child.wait()
    if code or not target.is_file():
        raise JobFailed(
            f"{program} made no {kind} of {source} (code {code}): {said.strip()}", hint="is it of a current llama.cpp?"
        )


def _bind(source: Path, target: Path, kind: str) -> None:
    llama = importlib.import_module(BINDING)
    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), options)
    if code:
        raise JobFailed(f"llama-cpp-python made no {kind} of {source} (code {code})", hint="install llama.cpp's llama-quantize")


def _quantize_here(source: Path, target: Path, kind: Kind, told: Told) -> None:
    """Tensor by tensor, some rows at a time, on all cores: memory does not grow with the model."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents()))
    _copy_header(reader, writer, kind)
    del reader  # it maps the file
    tensors = tensors_of(source)
    kinds = {name: _kind_of(name, tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        size = tensor.shape[0] * row_bytes(tensor.columns, kinds[name]) if len(tensor.shape) > 1 else 4 * tensor.shape[0]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    done, total = 0, sum(tensor.shape[0] * tensor.row_bytes if len(tensor.shape) > 1 else 0 for tensor in tensors.values())
    for name, tensor in tensors.items():
        written = _append(file, tensor, kinds[name])
        writer.write_padding(file, written)
        done += tensor.shape[0] * tensor.row_bytes if len(tensor.shape) > 1 else 0
        told(done, max(total, 1))
    writer.close()


def _copy_header(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, kind: Kind) -> None:
    """All that the file says of itself, but for how its weights are stored."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE, QUANTIZED):
            continue
        items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


QUANTIZED = gguf.Keys.General.QUANTIZATION_VERSION


def _kind_of(name: str, tensor: Tensor, kind: Kind) -> Kind:
    """As llama.cpp decides: vectors stay float32, the output (and the embedding, which may be it) keeps more bits."""
    if len(tensor.shape) == 1 or not name.endswith("weight") or "_norm" in name:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.columns % block:
        return Kind.F16
    return Kind.Q8_0 if name in KEPT_LARGER else kind


def _append(file: IO[bytes], tensor: Tensor, kind: Kind) -> int:
    """Write the rows of a tensor; the bytes written."""
    step = max(1, PIECE_VALUES // max(1, tensor.columns))
    if len(tensor.shape) == 1:
        step = tensor.shape[0]
    written = 0
    for piece in in_order(
        partial(_piece, tensor, kind, first, min(first + step, tensor.shape[0])) for first in range(0, tensor.shape[0], step)
    ):
        file.write(piece.data)
        written += piece.nbytes
    return written


def _piece(tensor: Tensor, kind: Kind, first: int, last: int) -> npt.NDArray[np.uint8]:
    rows = tensor.rows(first, last)
    return np.ascontiguousarray(gguf.quantize(rows, kind)).view(np.uint8).reshape(-1)
