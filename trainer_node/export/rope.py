"""Rotary positions in a GGUF: the keys and tensors from which llama.cpp computes the angles that transformers computes.

- What llama.cpp computes by itself is told by keys (linear, YaRN); what it does not is a tensor of divisors, one a pair of values
  (Llama 3, LongRoPE).
- YaRN multiplies by 1 + 0.1 ln(factor) in both programs, so only a deviation from that is written.
- A kind of scaling that a family's graph in llama.cpp ignores is refused: the model would load, and answer wrongly at length.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from config.errors import JobFailed

Metadata = dict[str, int | float | str]
Tensors = dict[str, npt.NDArray[np.float32]]
ROPE = gguf.Keys.Rope
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # in a header of these families llama.cpp does not read them


def rope_of(parameters: Mapping[str, Any], context: int, dimensions: int, allowed: tuple[str, ...]) -> tuple[Metadata, Tensors]:
    """Keys (with {arch}) and tensors for the `rope_parameters` of a config of transformers 5.

    Args:
        context: max_position_embeddings, in tokens.
        dimensions: values of a head that are rotated.
        allowed: kinds of scaling that llama.cpp knows for this family.

    Raises:
        JobFailed: another kind, or an option of YaRN that llama.cpp does not have.
    """
    kind = str(parameters.get("rope_type", "default"))
    if kind not in ("default", *allowed):
        raise JobFailed(
            f"rope scaling {kind!r}: llama.cpp has none for this architecture",
            hint=f"these can be exported: {', '.join(('default', *allowed))}",
        )
    keys: Metadata = {ROPE.FREQ_BASE: float(parameters["rope_theta"]), ROPE.DIMENSION_COUNT: dimensions}
    if kind == "linear":
        return keys | {ROPE.SCALING_TYPE: "linear", ROPE.SCALING_FACTOR: float(parameters["factor"])}, {}
    if kind == "yarn":
        return keys | _yarn(parameters, context), {}
    if kind == "llama3":
        return keys, {"rope_freqs.weight": _llama3_divisors(parameters, dimensions)}
    if kind == "longrope":
        long, short = (np.asarray(parameters[f"{name}_factor"], np.float32) for name in ("long", "short"))
        tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
        return keys | _longrope(parameters, context), tensors
    return keys, {}


def _yarn(parameters: Mapping[str, Any], context: int) -> Metadata:
    if not parameters.get("truncate", True):
        raise JobFailed(
            "rope scaling 'yarn' with truncate = false: llama.cpp always rounds the range", hint="use another base model"
        )
    betas = tuple(float(parameters.get(key) or default) for key, default in YARN_BETAS.items())
    if betas != tuple(YARN_BETAS.values()):
        fast, slow = betas
        raise JobFailed(
            f"rope scaling 'yarn' with beta_fast {fast:g} and beta_slow {slow:g}: llama.cpp always has 32 and 1 here",
            hint="use another base model",
        )
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or context / original)
    keys: Metadata = {
        ROPE.SCALING_TYPE: "yarn",
        ROPE.SCALING_FACTOR: factor,
        ROPE.SCALING_ORIG_CTX_LEN: original,
        ROPE.SCALING_YARN_BETA_FAST: YARN_BETAS["beta_fast"],
        ROPE.SCALING_YARN_BETA_SLOW: YARN_BETAS["beta_slow"],
    }
    wanted = parameters.get("attention_factor")
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if wanted is None and mscale and all_dim:
        wanted = _yarn_attention(factor, mscale) / _yarn_attention(factor, all_dim)
    if wanted is not None:
        keys[ROPE.SCALING_ATTN_FACTOR] = float(wanted) / _yarn_attention(factor)
    return keys


def _yarn_attention(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(parameters: Mapping[str, Any], context: int) -> Metadata:
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or context / original)
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {ROPE.SCALING_TYPE: "longrope", ROPE.SCALING_ORIG_CTX_LEN: original, ROPE.SCALING_ATTN_FACTOR: float(attention)}


def _llama3_divisors(parameters: Mapping[str, Any], dimensions: int) -> npt.NDArray[np.float32]:
    """(dimensions / 2,): 1 for short waves, `factor` for long ones, in between what blends their frequencies."""
    factor, original = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    waves = 2 * math.pi * float(parameters["rope_theta"]) ** (np.arange(0, dimensions, 2) / dimensions)  # in tokens
    blend = np.clip((original / waves - low) / (high - low), 0.0, 1.0)  # 1: keep the frequency, 0: divide it
    return np.asarray(1.0 / ((1 - blend) / factor + blend), np.float32)
