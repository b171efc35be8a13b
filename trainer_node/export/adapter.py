"""LoRA adapter as GGUF. llama.cpp computes W·x + alpha/rank · B·(A·x) on weights whose rows it may have reordered.

- alpha is one for the whole file: where a module's own scale is another, B carries the difference.
- lora_b has its rows in the order of the weight in the GGUF (Q and K of the llama family).
- Only what the base has as a tensor of its own can be adapted: an output that is the embedding cannot.
"""

from pathlib import Path

import gguf
import numpy as np

from trainer_node.export.architectures import architecture_of
from trainer_node.export.lora import adapter_config, read_adapter
from trainer_node.export.weights import tensors_of
from trainer_node.export.writing import whole_file


def export_adapter(adapter: Path, base: Path, target: Path) -> None:
    """Write a PEFT adapter folder as one GGUF file, whole or not at all.

    Args:
        base: what it was trained on, a GGUF file or a Hugging Face folder.

    Raises:
        JobFailed: the adapter has a part that a GGUF adapter cannot express, or does not fit the base.
        DiskFull, StoreError: the target cannot be written.
    """
    architecture = architecture_of(base)
    added = read_adapter(adapter, tensors_of(base, architecture.names))
    alpha = float(adapter_config(adapter)["lora_alpha"]) or 1.0  # llama.cpp takes 0 for a scale of 1
    with whole_file(target, sum(low_rank.size for low_rank in added.values())) as file:
        writer = gguf.GGUFWriter(file, architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, low_rank in added.items():
            stored = architecture.stored_name(name)
            b = architecture.stored_order(name)(low_rank.b.rows()) * np.float32(low_rank.scale * low_rank.rank / alpha)
            writer.add_tensor(f"{stored}.lora_a", low_rank.a.rows())
            writer.add_tensor(f"{stored}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
