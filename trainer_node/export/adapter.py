"""LoRA adapter as GGUF. llama.cpp computes W·x + alpha/rank · B·(A·x) on weights whose rows it may have reordered.

- alpha is one for the whole file: where a module's own scale is another, B carries the difference.
- lora_b has its rows in the order of the weight in the GGUF (Q and K of the llama family).
- Only what the base has as a tensor of its own can be adapted: an output that is the embedding cannot.
"""

from contextlib import closing
from pathlib import Path

import gguf
import numpy as np

from config.errors import JobFailed
from trainer_node.export.architectures import architecture_of, model_tensors
from trainer_node.export.lora import DIVERGED, adapter_config, read_adapter
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
    added = read_adapter(adapter, model_tensors(base, architecture))
    alpha = float(adapter_config(adapter)["lora_alpha"]) or 1.0  # llama.cpp takes 0 for a scale of 1
    with whole_file(target, sum(low_rank.size for low_rank in added.values())) as file:
        with closing(gguf.GGUFWriter(file, architecture.name)) as writer:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            for name, low_rank in added.items():
                a = low_rank.a.rows()
                b = architecture.stored_order(name)(low_rank.b.rows()) * np.float32(low_rank.scale * low_rank.rank / alpha)
                if not (np.isfinite(a).all() and np.isfinite(b).all()):
                    raise JobFailed(f"{adapter}: {name} has values that are no numbers", hint=DIVERGED)
                writer.add_tensor(f"{architecture.stored_name(name)}.lora_a", a)
                writer.add_tensor(f"{architecture.stored_name(name)}.lora_b", np.ascontiguousarray(b))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
