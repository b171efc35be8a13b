"""LoRA adapter as GGUF. llama.cpp computes W·x + alpha/rank · B·(A·x) on weights whose Q and K rows it has reordered.

Rows of Q and K stand in pairs of halves in a GGUF of the llama family (Hugging Face rotates the two halves of a head,
llama.cpp neighbouring values), so lora_b of these two is reordered too. What that arithmetic does not cover is refused.
"""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from config.errors import JobFailed
from trainer_node.train.base import BaseModel

PREFIX = "base_model.model."
REORDERED = {"attn_q": "heads", "attn_k": "kv_heads"}
REFUSED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "lora_bias")

Matrix = npt.NDArray[np.float32]


def export_adapter(adapter: Path, base: BaseModel, target: Path) -> None:
    """Write a PEFT adapter folder as one GGUF file, whole or not at all.

    Raises:
        JobFailed: the adapter has a part that a GGUF adapter cannot express.
    """
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    tensors = gguf_tensors(read_weights(adapter / "adapter_model.safetensors"), config, base)
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, base.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scaled_alpha(config))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def gguf_tensors(weights: dict[str, Matrix], config: dict[str, Any], base: BaseModel) -> dict[str, Matrix]:
    """Names and values as llama.cpp wants them: `blk.N.attn_q.weight.lora_a` (rank, in), `….lora_b` (out, rank)."""
    refused = [key for key in REFUSED if config.get(key)]
    if refused:
        raise JobFailed(f"the adapter uses {', '.join(refused)}", hint="train a plain LoRA, or merge it into the base's weights")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.layers)
    tensors = {}
    for key, value in weights.items():
        module, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        name = names.get_name(module)
        if part not in ("A.weight", "B.weight") or name is None or not name.startswith("blk."):
            raise JobFailed(f"the adapter's tensor {key} has no place in a GGUF adapter", hint="adapt linear layers only")
        heads = REORDERED.get(name.rsplit(".", 1)[1])
        if part == "B.weight" and heads is not None:
            value = reorder_rows(value, getattr(base, heads))
        tensors[f"{name}.weight.lora_{part[0].lower()}"] = np.ascontiguousarray(value, dtype=np.float32)
    return tensors


def reorder_rows(rows: Matrix, heads: int) -> Matrix:
    """(out, rank) with each head's two halves interleaved, as llama.cpp's converter does for Q and K."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def scaled_alpha(config: dict[str, Any]) -> float:
    """The alpha that, divided by the rank, gives PEFT's scale: rsLoRA divides by its root instead."""
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return float(alpha * rank**0.5) if config.get("use_rslora") else alpha


def read_weights(path: Path) -> dict[str, Matrix]:
    from safetensors.numpy import load_file

    return {name: np.asarray(value, dtype=np.float32) for name, value in load_file(path).items()}
