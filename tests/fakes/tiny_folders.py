"""Tiny random models of every family as Hugging Face folders: bf16 safetensors, a trained tokenizer, configs as real ones differ.

    folder = write_folder("qwen2-yarn", tmp_path / "base")

Weights are drawn so wide that every layer matters to every answer; the embedding has more rows than the tokenizer has tokens.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.fakes.family_tokenizers import write_family

ROWS = 1117  # of the embedding: odd, and more than any of the tokenizers has tokens
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LONG_FROM = 256  # tokens; llama.cpp rounds contexts up to multiples of this
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.1, 1.4, 2.0, 3.0, 5.0, 8.0],
    "partial_rotary_factor": 0.75,
}


class Tiny(NamedTuple):
    model_type: str
    tokenizer: str
    config: dict[str, Any]


SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "tie_word_embeddings": True}
TINY = {
    "llama": Tiny("llama", "llama", {"rope_parameters": PLAIN}),
    "llama-llama3": Tiny("llama", "llama3", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biased": Tiny("llama", "llama3", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": Tiny("llama", "llama3", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "mistral": Tiny("mistral", "mistral", {"rope_parameters": PLAIN, "head_dim": 24, "sliding_window": None}),
    "mistral-window": Tiny("mistral", "tekken", {"rope_parameters": PLAIN, "sliding_window": 128}),
    "qwen2": Tiny("qwen2", "qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-yarn": Tiny("qwen2", "qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": Tiny(
        "qwen3", "qwen3", {"rope_parameters": PLAIN | {"rope_theta": 1e6}, "head_dim": 32, "tie_word_embeddings": True}
    ),
    "qwen3-linear": Tiny("qwen3", "qwen3", {"rope_parameters": LINEAR, "head_dim": 16}),
    "gemma2": Tiny("gemma2", "gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}),
    "gemma3": Tiny(
        "gemma3_text",
        "gemma3",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3_000.0},
            },
        },
    ),
    "phi3": Tiny("phi3", "phi3", {"rope_parameters": PLAIN, "sliding_window": None, "tie_word_embeddings": True}),
    "phi3-long": Tiny(
        "phi3",
        "phi3",
        {"rope_parameters": LONG, "max_position_embeddings": 1024, "original_max_position_embeddings": LONG_FROM},  # as the hub's
    ),
}


def write_folder(name: str, folder: Path, *, seed: int = 0, shard: str = "300KB") -> Path:
    """config.json, tokenizer and weights, sharded where they are more than `shard`."""
    tiny = TINY[name]
    write_family(tiny.tokenizer, folder)
    config = CONFIG_MAPPING[tiny.model_type](**(SIZES | tiny.config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, values in model.named_parameters():
            if key.endswith(("norm.weight", ".bias")):  # transformers begins these at 1 and 0, so a mistake would not show
                values += 0.2 * torch.randn_like(values)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return folder
