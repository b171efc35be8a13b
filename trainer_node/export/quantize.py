"""Quantizing: a GGUF of 16 bits into a smaller one, by the best quantizer of this machine. What was really made is what is told.

First that is there: the llama-quantize that Ollama carries, one on PATH, llama-cpp-python, and the gguf package, which makes
Q8_0, Q5_1 and Q4_0 alone. Where it stands in for another kind, that is said before anything is made, and no file is ever called
what it is not. The target is whole or not there: what a quantizer says of its end is believed only once its file has been read.

llama.cpp runs as a process of its own, the library of llama-cpp-python too: it can be stopped between two tensors, and where it
aborts or runs out of memory it takes nothing along. Whoever it works for is at the other end of its output: when that one is
killed, its next line ends it.
"""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import gguf
import numpy as np
import numpy.typing as npt

from config.errors import JobFailed
from trainer_node.export.merged import NOT_COPIED
from trainer_node.export.weights import Header, Kind, Tensor, read_header, row_bytes, tensors_of
from trainer_node.export.writing import Told, in_order, require_room, whole_file
from trainer_node.processes import describe_exit
from trainer_node.runtime.gguf_file import NotGguf, read_gguf

log = logging.getLogger("hafs")

PROGRAM = "llama-quantize"
BINDING = "llama_cpp"
BOUND = """
import importlib, os, signal, sys
name, source, target, kind = sys.argv[1:]
if hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and would work on for nobody
llama = importlib.import_module(name)
llama.llama_log_set(llama.llama_log_callback(0), None)  # to stderr, what llama-cpp-python leaves out: how far it is
options = llama.llama_model_quantize_default_params()
options.ftype = getattr(llama, "LLAMA_FTYPE_MOSTLY_" + kind)
sys.exit(llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), options))
"""
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
REINSTALL = "install the quantizer of a current llama.cpp or Ollama, or remove this one from the PATH to use the next there is"
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
PART = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")  # [  17/ 272] blk.1.attn_q.weight - …; where a line begins: elsewhere a model speaks
LAST_LINES, LINE_CHARACTERS = 3, 300  # of what it says, to be told where it fails: the reason stands at the end


@dataclass(frozen=True)
class Choice:
    """Who will quantize, and to what. `note` is not empty where that is not what was asked for.

    `command` is how llama.cpp is started, without its arguments: source, target and kind. Empty: the gguf package.
    """

    name: str
    makes: str
    command: tuple[str, ...] = ()
    note: str = ""


def choose(kind: str) -> Choice:
    """The quantizer of this machine for `kind`, as llama.cpp names it. Raises JobFailed for a kind that is none."""
    if kind not in (*MADE_IN_PYTHON, *STANDS_IN):
        known = ", ".join((*MADE_IN_PYTHON, *STANDS_IN))
        raise JobFailed(f"{kind!r} is no kind of quantized weights", hint=f"one of these: {known}")
    for program in (*_of_ollama(), *_on_path()):
        return Choice(f"llama-quantize ({program})", kind, (str(program),))
    if importlib.util.find_spec(BINDING) is not None:
        return Choice("llama-cpp-python", kind, (sys.executable, "-P", "-c", BOUND, BINDING))
    made = kind if kind in MADE_IN_PYTHON else STANDS_IN[kind]
    note = f"{made} stands in for {kind}: this machine has no llama-quantize, which makes that" if made != kind else ""
    return Choice(f"gguf {gguf_version()}", made, note=note)


def quantize(source: Path, target: Path, kind: str, told: Told, choice: Choice | None = None) -> str:
    """Write `source` (F16 or F32) as `target`.

    Args:
        kind: as llama.cpp names it. What the first quantizer there makes of it says `choose`.
        told: told bytes of the source done and in all.
        choice: what `choose` has said, where the target is named by that; a machine may get or lose a quantizer meanwhile.

    Returns:
        The quantizer that was used.

    Raises:
        JobFailed: the quantizer cannot be started, failed, or made something else than it was asked for.
        DiskFull, StoreError: the target cannot be written.
    """
    choice = choice or choose(kind)
    if choice.note:
        log.warning(choice.note)
    size = source.stat().st_size
    room = int(size * BITS[choice.makes] / 16)
    with whole_file(target, room) as file:
        if choice.command:
            _run(choice, source, file, room, lambda share: told(int(size * share), size))
        else:
            _quantize_here(source, file, MADE_IN_PYTHON[choice.makes], told)
        _require_made(source, file, choice)
        told(size, size)
    return choice.name


def gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _of_ollama() -> Iterator[Path]:
    """Where Ollama's program looks for its libraries (Linux, Windows, macOS), and where its installers put them."""
    found = shutil.which("ollama")
    folders: list[Path] = []
    if found is not None:
        own = Path(found).resolve().parent
        folders += [own.parent / "lib" / "ollama", own / "lib" / "ollama", own]
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        folders.append(Path(os.environ["LOCALAPPDATA"]) / "Programs" / "Ollama" / "lib" / "ollama")
    elif sys.platform == "darwin":
        folders.append(Path("/Applications/Ollama.app/Contents/Resources"))
    folders += [Path("/usr/local/lib/ollama"), Path("/usr/lib/ollama")]
    return (program for folder in folders for program in _programs(str(folder)))


def _on_path() -> Iterator[Path]:
    return _programs(None)


def _programs(path: str | None) -> Iterator[Path]:
    """The quantizer in these folders, by the system's rules; None: in those of PATH."""
    found = shutil.which(PROGRAM, path=path)
    return iter([Path(found)] if found else [])


def _run(choice: Choice, source: Path, target: Path, room: int, on_share: Callable[[float], None]) -> None:
    """llama.cpp says which tensor it is done with; what `on_share` raises ends it.

    The paths are absolute: it takes a target that begins with a digit for the number of a kind, and one with - for an option.
    """
    argv = [*choice.command, str(source.absolute()), str(target.absolute()), choice.makes]
    try:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:  # of another kind of machine, or no program at all
        raise JobFailed(f"{choice.name} cannot be started: {error.strerror}", hint=REINSTALL) from error
    assert child.stdout is not None
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        for raw in child.stdout:
            line = raw.decode(errors="replace").strip()
            last.append(line[:LINE_CHARACTERS])
            if match := PART.match(line):
                on_share(int(match[1]) / int(match[2]))
        code = child.wait()
    finally:
        child.stdout.close()
        child.kill()
        child.wait()
    if code:
        written = target.stat().st_size if target.exists() else 0
        require_room(target, max(room - written, 0))  # of a full disk it says "iostream error"
        told = f"{choice.name} made no {choice.makes} of {source}: it {describe_exit(code)}: {' / '.join(filter(None, last))}"
        raise JobFailed(told, hint=REINSTALL)


def _require_made(source: Path, target: Path, choice: Choice) -> None:
    """Raises JobFailed where the target is not the whole model in the kind that was asked for."""
    wanted = {tensor.name: tensor.shape for tensor in read_gguf(source).tensors}
    try:
        made = read_gguf(target)
    except (OSError, NotGguf) as error:
        raise JobFailed(f"{choice.name} ended well, but left no whole GGUF of {source}: {error}", hint=REINSTALL) from error
    if {tensor.name: tensor.shape for tensor in made.tensors} != wanted or made.file_type != choice.makes:
        told = f"{choice.name} made something else of {source}: {made.file_type} instead of {choice.makes}, or other tensors"
        raise JobFailed(told, hint=REINSTALL)


def _quantize_here(source: Path, target: Path, kind: Kind, told: Told) -> None:
    """Tensor by tensor, some rows at a time, on all cores: memory does not grow with the model."""
    tensors = tensors_of(source)
    kinds = {name: _kind_of(name, tensor, kind) for name, tensor in tensors.items()}
    header = read_header(source)
    architecture = str(header.value(gguf.Keys.General.ARCHITECTURE, ""))
    with closing(gguf.GGUFWriter(target, architecture)) as writer:  # Windows removes no file that is open
        _copy_header(header, writer, kind)
        for name, tensor in tensors.items():
            size = tensor.shape[0] * row_bytes(tensor.columns, kinds[name])
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        done, total = 0, sum(tensor.shape[0] * tensor.row_bytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            writer.write_padding(file, _append(file, tensor, kinds[name]))
            done += tensor.shape[0] * tensor.row_bytes
            told(done, total)


def _copy_header(header: Header, writer: gguf.GGUFWriter, kind: Kind) -> None:
    """All that the file says of itself, but for how its weights are stored."""
    for name, (value, types) in header.fields.items():
        if name not in NOT_COPIED and value != []:  # the writer refuses an empty list, which says nothing
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


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
