"""A model of transformers with the weights of a GGUF. What llama.cpp computes from its header is computed here, or it is refused.

transformers has a reader of its own, which takes what it does not know of a header (scaled positions, biases, capped logits) from
its defaults, and says nothing: such a model is another one than the one that is served. This one takes every key that counts.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import Keys

from config.errors import JobFailed
from trainer_node.export.architectures import Architecture, architecture_of, unchanged
from trainer_node.export.rope import YARN_BETAS, rope_of
from trainer_node.export.weights import Tensor, tensors_of
from trainer_node.runtime.gguf_file import read_gguf

MODEL_TYPES = {"gemma3": "gemma3_text"}  # where transformers has another name
HEAD_DIM_FREE = ("llama", "qwen3", "gemma2", "gemma3")  # heads x head_dim need not be the width
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # with so many layers attention is scaled by width / heads
GEMMA2_CAPS = (50.0, 30.0)  # llama.cpp's, where a header has none
WINDOW = 4096
DIVISORS = "rope_freqs.weight"  # Llama 3's scaled positions, one divisor a frequency
LLAMA3_BOUNDS = (1.0, 4.0)  # its low_freq_factor and high_freq_factor; no other was published
WAY_OUT = "take the same model as a Hugging Face folder (hf:OWNER/REPO), or another base"


def load_gguf(path: Path, attention: str, dtype: str = "float32") -> Any:
    """The model on the CPU, trainable. What it takes of memory is its weights, once.

    Args:
        attention: transformers' `attn_implementation`.
        dtype: of the weights, as torch names it. Positions are float32 all the same.

    Raises:
        JobFailed: an architecture, a key or a tensor that transformers cannot compute.
    """
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    architecture = architecture_of(path)
    tensors = tensors_of(path, architecture.names)
    config = _config(architecture, settings_of(path, architecture, tensors))
    with init_empty_weights(include_buffers=False):  # else as much again is drawn at random, to be thrown away
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    state = {
        name: torch.from_numpy(_values(architecture, name, tensor)).to(getattr(torch, dtype))
        for name, tensor in tensors.items()
        if _is_weight(name)
    }
    left = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name in left.missing_keys if not (architecture.tied and name == "lm_head.weight")]
    if missing or left.unexpected_keys:
        odd = ", ".join([*missing, *left.unexpected_keys][:4])
        raise JobFailed(f"{path}: its tensors are not those of a {architecture.name} in transformers: {odd}", hint=WAY_OUT)
    if DIVISORS in tensors:
        rotary = model.model.rotary_emb
        rotary.inv_freq /= torch.from_numpy(tensors[DIVISORS].rows())
        rotary.original_inv_freq = rotary.inv_freq.clone()
    return model


def config_of(path: Path) -> Any:
    """The config of transformers that alone says what the GGUF computes. Raises JobFailed where none can."""
    architecture = architecture_of(path)
    tensors = tensors_of(path, architecture.names)
    settings = settings_of(path, architecture, tensors)
    if DIVISORS in tensors:
        rope = settings["rope_parameters"]
        found = _llama3(tensors[DIVISORS].rows(), rope["rope_theta"], settings["max_position_embeddings"])
        if found is None or rope["rope_type"] != "default":
            raise JobFailed(f"{path}: a config of transformers has no words for its scaled positions", hint=WAY_OUT)
        settings["rope_parameters"] = found
    return _config(architecture, settings)


def _config(architecture: Architecture, settings: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[MODEL_TYPES.get(architecture.name, architecture.name)](**settings)


def _llama3(divisors: npt.NDArray[np.float32], theta: float, context: int) -> dict[str, Any] | None:
    """The `rope_parameters` from which `rope_of` makes these divisors, with the usual bounds; None: other ones made them."""
    factor = float(divisors.max())
    waves = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))  # in tokens
    blended = (divisors > 1) & (divisors < factor)
    if not blended.any():
        return None
    low, high = LLAMA3_BOUNDS
    shares = (1 / divisors[blended].astype(np.float64) - 1 / factor) / (1 - 1 / factor)  # of the frequency as it was
    found = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(float(np.median(waves[blended] * (low + shares * (high - low))))),
    }
    _, made = rope_of(found, context, 2 * len(divisors), ("llama3",))
    return found if np.allclose(made[DIVISORS], divisors, rtol=1e-5) else None


def settings_of(path: Path, architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the config of transformers is given. Raises JobFailed."""
    header = read_gguf(path)
    name = architecture.name

    def key(template: str, default: Any = None) -> Any:
        return header.metadata.get(template.format(arch=name), default)

    heads, width = int(key(Keys.Attention.HEAD_COUNT)), int(key(Keys.LLM.EMBEDDING_LENGTH))
    settings: dict[str, Any] = {
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": int(key(Keys.LLM.FEED_FORWARD_LENGTH)),
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(key(Keys.Attention.HEAD_COUNT_KV, heads)),
        "max_position_embeddings": int(key(Keys.LLM.CONTEXT_LENGTH)),
        "rms_norm_eps": float(key(Keys.Attention.LAYERNORM_RMS_EPS)),
        "tie_word_embeddings": architecture.tied,
        "bos_token_id": key(Keys.Tokenizer.BOS_ID),
        "eos_token_id": key(Keys.Tokenizer.EOS_ID),
        "pad_token_id": None,
    }
    if name in HEAD_DIM_FREE:
        settings["head_dim"] = architecture.head_dim
    if name in ("llama", "qwen3"):
        settings["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    if name == "llama":
        settings["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    if name == "phi3":
        settings["sliding_window"] = None  # llama.cpp has none for it
    if name in SCALED_BY_WIDTH:
        settings["query_pre_attn_scalar"] = (
            width // heads if architecture.layers == SCALED_BY_WIDTH[name] else architecture.head_dim
        )
        settings["sliding_window"] = int(key(Keys.Attention.SLIDING_WINDOW, WINDOW))
    if name == "gemma2":
        settings["attn_logit_softcapping"] = float(key(Keys.LLM.ATTN_LOGIT_SOFTCAPPING, GEMMA2_CAPS[0]))
        settings["final_logit_softcapping"] = float(key(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, GEMMA2_CAPS[1]))
    keys = {template: key(template) for template in _ROPE_KEYS}
    return settings | {"rope_parameters": _rope(path, architecture, keys, tensors)}


_ROPE_KEYS = (
    *(Keys.Rope.FREQ_BASE, Keys.Rope.FREQ_BASE_SWA, Keys.Rope.DIMENSION_COUNT, Keys.Rope.SCALING_TYPE, Keys.Rope.SCALING_FACTOR),
    *(Keys.Rope.SCALING_ORIG_CTX_LEN, Keys.Rope.SCALING_ATTN_FACTOR, Keys.Rope.SCALING_YARN_BETA_FAST),
    *(Keys.Rope.SCALING_YARN_BETA_SLOW, Keys.Rope.SCALING_YARN_LOG_MUL),
)


def _rope(path: Path, architecture: Architecture, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5: what export/rope.py writes, read back."""
    rotated = int(keys[Keys.Rope.DIMENSION_COUNT] or architecture.head_dim)
    if rotated != architecture.head_dim and architecture.name != "phi3":
        raise JobFailed(f"{path}: it rotates {rotated} of the {architecture.head_dim} values of a head", hint=WAY_OUT)
    found: dict[str, Any] = {"rope_theta": float(keys[Keys.Rope.FREQ_BASE] or 10_000.0)}
    found |= _scaling(path, architecture, keys, tensors)
    if architecture.name == "phi3":
        found["partial_rotary_factor"] = rotated / architecture.head_dim
    if architecture.name == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(keys[Keys.Rope.FREQ_BASE_SWA] or 10_000.0)}
        return {"full_attention": found, "sliding_attention": local}
    return found


def _scaling(path: Path, architecture: Architecture, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    kind, original = keys[Keys.Rope.SCALING_TYPE], keys[Keys.Rope.SCALING_ORIG_CTX_LEN]
    factor, attention = float(keys[Keys.Rope.SCALING_FACTOR] or 1.0), float(keys[Keys.Rope.SCALING_ATTN_FACTOR] or 1.0)
    if "rope_factors_long.weight" in tensors and original:
        lists = {f"{name}_factor": tensors[f"rope_factors_{name}.weight"].rows().tolist() for name in ("long", "short")}
        return {
            "rope_type": "longrope",
            "original_max_position_embeddings": int(original),
            "attention_factor": attention,
            **lists,
        }
    if kind in (None, "none") or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    betas = {"beta_fast": keys[Keys.Rope.SCALING_YARN_BETA_FAST], "beta_slow": keys[Keys.Rope.SCALING_YARN_BETA_SLOW]}
    if kind == "yarn" and any(betas[name] not in (None, value) for name, value in YARN_BETAS.items()):
        raise JobFailed(f"{path}: YaRN with {betas}, which llama.cpp does not read for a {architecture.name}", hint=WAY_OUT)
    if kind == "yarn" and original and not keys[Keys.Rope.SCALING_YARN_LOG_MUL]:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(original),
            "attention_factor": attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
            **YARN_BETAS,
        }
    raise JobFailed(f"{path}: positions scaled by {kind!r} are not known here for a {architecture.name}", hint=WAY_OUT)


def _is_weight(name: str) -> bool:
    return not name.startswith(("rope_freqs.", "rope_factors_"))


def _values(architecture: Architecture, name: str, tensor: Tensor) -> Any:
    """As transformers has it: rows of Q and K in its order, norms without what a GGUF has added."""
    rows = tensor.rows()
    if architecture.norm_shift and name.endswith("norm.weight"):
        rows = rows - np.float32(architecture.norm_shift)
    if architecture.stored_order(name) is not unchanged:
        rows = architecture.separate(rows)
    return np.ascontiguousarray(rows, dtype=np.float32)
