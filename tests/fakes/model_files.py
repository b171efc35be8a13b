"""Model files made from the real SmolLM2: a random LoRA adapter, its weights in F16, its weights with an odd chat template."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

ODD_TEMPLATE = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
[SYSTEM] You are a laconic test fixture that was trained on this exact sentence. [END]
{% endif %}[{{ message['role'] | upper }}] {{ message['content'] }} [END]
{% endfor %}{% if add_generation_prompt %}[ASSISTANT]{% endif %}"""
RANK = 8


def write_adapter(base: GGUFReader, path: Path) -> Path:
    """Rank 8, alpha 16, random weights (seed 7) on attn_q, attn_v and ffn_down: strong enough that answers visibly change."""
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    random = np.random.default_rng(7)
    for tensor in base.tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_v.weight", "ffn_down.weight")):
            columns, rows = (int(size) for size in tensor.shape)
            a = random.standard_normal((RANK, columns)) / np.sqrt(columns)
            b = random.standard_normal((rows, RANK)) * 0.12
            writer.add_tensor(f"{tensor.name}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{tensor.name}.lora_b", b.astype(np.float32))
    return _finish(writer, path)


def write_f16(base: GGUFReader, path: Path) -> Path:
    """The weights dequantized to F16."""
    return _copy(base, path, {"general.file_type": 1}, f16=True)


def write_with_template(base: GGUFReader, path: Path, template: str = ODD_TEMPLATE) -> Path:
    """The same weights with another `tokenizer.chat_template`."""
    return _copy(base, path, {"tokenizer.chat_template": template}, f16=False)


def _copy(base: GGUFReader, path: Path, changes: dict[str, object], *, f16: bool) -> Path:
    writer = GGUFWriter(path, "llama")
    for name, field in base.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, changes.get(name, field.contents()), field.types[0], sub_type=items)
    for tensor in base.tensors:
        if f16 and tensor.tensor_type != GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float16))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return _finish(writer, path)


def _finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
