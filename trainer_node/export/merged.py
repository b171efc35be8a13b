"""A whole GGUF: the base with an adapter merged in. Written in pieces of some rows, so memory does not grow with the model.

- Every weight is W + scale * B A in float32 from the base's own 16 bits, and rounded once, to what is written.
- The header is complete before the first weight is read: the sizes of all tensors are known from the base's.
- Vectors stay float32, as llama.cpp wants them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import gguf
import numpy as np

from config.errors import JobFailed
from trainer_node.base_model import model_name
from trainer_node.export.architectures import Architecture, Arrange, architecture_of, model_tensors, unchanged
from trainer_node.export.lora import read_adapter
from trainer_node.export.pieces import Weight, one_thread_a_piece
from trainer_node.export.weights import Kind, read_header
from trainer_node.export.writing import Told, in_order, whole_file

FILE_TYPES = {
    "F32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "BF16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
NOT_COPIED = (  # the writer's own, or of weights as they were
    gguf.Keys.General.ARCHITECTURE,
    gguf.Keys.General.FILE_TYPE,
    gguf.Keys.General.QUANTIZATION_VERSION,
    gguf.Keys.General.ALIGNMENT,
)
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
EMBEDDING = "token_embd.weight"


def export_merged(base: Path, adapter: Path | None, target: Path, told: Told, *, dtype: str = "F16") -> None:
    """Write base and adapter as one GGUF.

    Args:
        base: a GGUF file, or a Hugging Face folder with config.json, tokenizer and safetensors.
        adapter: the folder of a PEFT LoRA; None writes the base alone.
        told: told bytes written and bytes in all.
        dtype: of the matrices: "F16", "BF16" or "F32".

    Raises:
        JobFailed: an architecture, an adapter or a value that cannot be written.
        DiskFull, StoreError: the target cannot be.
    """
    kind, file_type = FILE_TYPES[dtype]
    architecture = architecture_of(base)
    weights = merged_weights(base, adapter, architecture, kind)
    size = sum(weight.size for weight in weights.values())
    with whole_file(target, size) as file:
        with closing(gguf.GGUFWriter(file, architecture.name)) as writer:
            writer.add_file_type(file_type)
            if base.is_dir():
                _describe(writer, base, architecture, rows=weights[EMBEDDING].shape[0])
            else:
                _copy_description(writer, base)
            _write_header(writer, weights, architecture)
        _append(file, weights, architecture, lambda done: told(min(done, size), size))


def merged_weights(base: Path, adapter: Path | None, architecture: Architecture, kind: Kind) -> dict[str, Weight]:
    """The weights of the target by their names in a GGUF. Raises JobFailed: no whole model, or not the adapter's."""
    tensors = model_tensors(base, architecture)
    added = read_adapter(adapter, tensors) if adapter is not None else {}
    weights = {}
    for name, tensor in tensors.items():
        order = architecture.stored_order(name)
        weights[architecture.stored_name(name) or name] = Weight(  # what only a GGUF has keeps its name
            tensor,
            kind if len(tensor.shape) > 1 else Kind.F32,
            added.get(name),
            arrange=unchanged if base.is_file() else _shifted(architecture, name, order),
            arrange_added=order,
            unit=1 if order is unchanged else architecture.head_dim,
        )
    if EMBEDDING not in weights:
        raise JobFailed(f"{base}: has no embedding", hint="give the GGUF of a whole model")
    return weights


def _shifted(architecture: Architecture, name: str, order: Arrange) -> Arrange:
    if not (architecture.norm_shift and name.endswith("norm.weight")):
        return order
    return lambda rows: rows + np.float32(architecture.norm_shift)


def _describe(writer: gguf.GGUFWriter, base: Path, architecture: Architecture, rows: int) -> None:
    from trainer_node.export.vocabulary import add_vocabulary

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_name(base))
    writer.add_vocab_size(rows)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in architecture.metadata.items():
        add[type(value)](key.format(arch=architecture.name), value)
    add_vocabulary(writer, base, rows)


def _copy_description(writer: gguf.GGUFWriter, base: Path) -> None:
    for key, (value, types) in read_header(base).fields.items():
        if key not in NOT_COPIED and value != []:  # the writer refuses an empty list, which says nothing
            writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)


def _write_header(writer: gguf.GGUFWriter, weights: Mapping[str, Weight], architecture: Architecture) -> None:
    for name, weight in weights.items():
        writer.add_tensor_info(name, weight.shape, np.dtype(np.float16), weight.size, raw_dtype=weight.kind)
    for name, values in architecture.tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _append(path: Path, weights: Mapping[str, Weight], architecture: Architecture, told: Callable[[int], None]) -> None:
    """The tensors after the header, each from an aligned byte on."""

    def calls() -> Iterator[Callable[[], memoryview | bytes]]:
        yield partial(bytes, -path.stat().st_size % ALIGNMENT)
        for weight in weights.values():
            yield from weight.pieces()
            yield partial(bytes, -weight.size % ALIGNMENT)
        for values in architecture.tensors.values():
            yield values.tobytes
            yield partial(bytes, -values.nbytes % ALIGNMENT)

    with path.open("ab") as file, one_thread_a_piece():
        start = file.tell()
        for piece in in_order(calls()):
            file.write(piece)
            told(file.tell() - start)
