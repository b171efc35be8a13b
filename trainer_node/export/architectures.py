"""Architectures: what of a Hugging Face config llama.cpp has to be told, under which name, and what it cannot be told.

- One table: a model_type is in FAMILIES and is tested against transformers, or it is refused by name before anything is written.
- llama.cpp hard-codes what a config can vary (activation, pattern of sliding windows, scale of attention): a config that says
  something else is refused, not rounded.
- Where llama.cpp has no sliding window for a family, the context ends at the window: up to there both compute the same.
- The weights of a folder are those of its config, all of them and no others: what transformers would draw at random, leave out
  or read otherwise is refused before it is trained.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from config.errors import JobFailed
from trainer_node.export.rope import Metadata, Tensors, rope_of
from trainer_node.export.weights import Matrix, Tensor, read_header, same_values, tensors_of

Arrange = Callable[[Matrix], Matrix]
LLM, ATTENTION = gguf.Keys.LLM, gguf.Keys.Attention
MERGE_ELSEWHERE = "use the 16-bit weights of the same model, in the Hugging Face format"


class Family(NamedTuple):
    """What llama.cpp has built in for a model_type."""

    arch: gguf.MODEL_ARCH
    activation: str
    ropes: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()  # linear layers that may have a bias
    reordered: bool = False  # rows of Q and K: see interleave
    norm_shift: float = 0.0  # transformers multiplies by 1 + weight, llama.cpp by what is stored
    window_period: int = 0  # every so many layers one attends to everything; 0: no layer has a window
    square_heads: bool = False  # heads x head_dim is the width of the model
    scaled_by_width: int = 0  # with so many layers, attention is scaled by width / heads instead of head_dim
    always_tied: bool = False
    partly_rotated: bool = False


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Family(
    gguf.MODEL_ARCH.LLAMA,
    "silu",
    ("linear", "yarn", "llama3"),
    (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
    reordered=True,
)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, "silu", ("linear", "yarn"), _QKV, square_heads=True),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, "silu", ("linear", "yarn")),
    "gemma2": Family(
        gguf.MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", norm_shift=1.0, window_period=2, scaled_by_width=46, always_tied=True
    ),
    "gemma3_text": Family(
        gguf.MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", ("linear",), norm_shift=1.0, window_period=6, scaled_by_width=62
    ),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, "silu", ("longrope",), square_heads=True, partly_rotated=True),
}
KNOWN = "llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3"
WAYS_OUT = {
    "gemma3": "it also sees images: take a GGUF of it, which has its language model alone, or one for text only, such as the 1B",
    "mistral3": "it also sees images: take a text-only model of the Mistral family",
    "mixtral": "mixtures of experts are not exported: take a dense model",
    "qwen2_moe": "mixtures of experts are not exported: take a dense model",
    "qwen3_moe": "mixtures of experts are not exported: take a dense model",
}
OUTPUT = "lm_head.weight"
COMPUTED = ".rotary_emb.inv_freq"  # older checkpoints store what a model computes
ROTATED = re.compile(r"\.[qk]_proj\.(weight|bias)$")
ATTENDING = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
SPLIT = (("self_attn.", ATTENDING), ("mlp.", ("gate_proj", "up_proj", "down_proj")), ("", NORMS))
FUSED = (("self_attn.", ("qkv_proj", "o_proj")), ("mlp.", ("gate_up_proj", "down_proj")), ("", NORMS))


@dataclass(frozen=True)
class Architecture:
    """A base as llama.cpp sees it. `metadata` (keys with {arch}) and `tensors` are empty for a GGUF, which has its own."""

    name: str
    layers: int
    head_dim: int
    reordered: bool
    norm_shift: float
    tied: bool
    biased: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)

    @cached_property
    def names(self) -> dict[str, str]:
        """Modules of transformers and their names in a GGUF: `model.layers.0.mlp.up_proj` is `blk.0.ffn_up`."""
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.name)
        inside = [
            f"{group}{module}" for group, modules in (FUSED if arch is gguf.MODEL_ARCH.PHI3 else SPLIT) for module in modules
        ]
        blocks = [f"model.layers.{layer}.{module}" for layer in range(self.layers) for module in inside]
        table = gguf.get_tensor_name_map(arch, self.layers)
        found = {module: table.get_name(module) for module in ["model.embed_tokens", *blocks, "model.norm", "lm_head"]}
        if self.tied:
            del found["lm_head"]
        return {module: name for module, name in found.items() if name is not None}

    def is_spare(self, name: str) -> bool:
        """Whether a checkpoint holds this tensor of transformers, and the model does without it."""
        return name.endswith(COMPUTED) or (self.tied and name == OUTPUT)

    def stored_name(self, name: str) -> str | None:
        """The GGUF's name of a tensor of transformers; None: it has no place there."""
        module, _, part = name.rpartition(".")
        last = module.rpartition(".")[2]
        if module not in self.names or (part == "bias" and last not in self.biased) or part not in ("weight", "bias"):
            return None
        return f"{self.names[module]}.{part}"

    def stored_order(self, name: str) -> Arrange:
        """How a GGUF orders the rows of this tensor of transformers."""
        return self.interleave if self.reordered and ROTATED.search(name) else unchanged

    def interleave(self, rows: Matrix) -> Matrix:
        """The two halves of each head, value by value: transformers rotates halves, llama.cpp's llama neighbours."""
        return rows.reshape(-1, 2, self.head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def separate(self, rows: Matrix) -> Matrix:
        """What `interleave` takes."""
        return rows.reshape(-1, self.head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unchanged(rows: Matrix) -> Matrix:
    return rows


def architecture_of(base: Path) -> Architecture:
    """The architecture of a GGUF file or of a Hugging Face folder.

    Raises:
        JobFailed: no model, or one that cannot be exported; says which, and the way out.
    """
    if not base.is_dir():
        return _of_gguf(base)
    found = _of_folder(base)
    _require_its_weights(base, found)
    return found


def model_tensors(base: Path, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors that make up a model, by their names in transformers; of a GGUF also those that only llama.cpp has."""
    found = tensors_of(base, architecture.names)
    return {name: tensor for name, tensor in found.items() if not architecture.is_spare(name)}


def _of_gguf(base: Path) -> Architecture:
    header = read_header(base)
    name = str(header.value(gguf.Keys.General.ARCHITECTURE, ""))
    families = {gguf.MODEL_ARCH_NAMES[family.arch]: family for family in FAMILIES.values()}
    if name not in families or int(header.value(LLM.EXPERT_COUNT.format(arch=name), 0)):
        raise _unknown(base, f"{name} with experts" if name in families else name)
    if header.value(gguf.Keys.General.TYPE, "model") != "model":
        raise JobFailed(f"{base}: holds no model but a part of one", hint="give the whole model")
    if int(header.value(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 1)) > 1:
        raise JobFailed(f"{base}: is one of several parts", hint="join them first: llama-gguf-split --merge")
    heads = int(header.value(ATTENTION.HEAD_COUNT.format(arch=name), 1))
    width = int(header.value(LLM.EMBEDDING_LENGTH.format(arch=name), 0))
    return Architecture(
        name=name,
        layers=int(header.value(LLM.BLOCK_COUNT.format(arch=name), 0)),
        head_dim=int(header.value(ATTENTION.KEY_LENGTH.format(arch=name), width // heads)),
        reordered=families[name].reordered,
        norm_shift=families[name].norm_shift,
        tied="output.weight" not in header.tensors,
        biased=families[name].biased,
    )


def _of_folder(base: Path) -> Architecture:
    try:
        written = dict(json.loads((base / "config.json").read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise JobFailed(f"{base}: has no readable config.json: {error}", hint="give a model's folder or a .gguf file") from error
    kind = str(written.get("model_type", ""))
    if kind not in FAMILIES:
        raise _unknown(base, kind)
    if written.get("quantization_config"):
        raise JobFailed(f"{base}: its weights are quantized, so an adapter cannot be merged into them", hint=MERGE_ELSEWHERE)
    family, config = FAMILIES[kind], _config(base)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    for problem in _deviations(family, config, head_dim):
        raise JobFailed(f"{base}: {problem}", hint=f"llama.cpp cannot compute such a {kind}: take another base model")
    try:
        metadata, tensors = _positions(family, config, head_dim)
    except JobFailed as error:
        raise JobFailed(f"{base}: {error}", hint=error.hint) from error
    return Architecture(
        name=gguf.MODEL_ARCH_NAMES[family.arch],
        layers=config.num_hidden_layers,
        head_dim=head_dim,
        reordered=family.reordered,
        norm_shift=family.norm_shift,
        tied=bool(config.tie_word_embeddings),
        biased=family.biased,
        metadata=_sizes(family, config, head_dim) | metadata,
        tensors=tensors,
    )


def _config(base: Path) -> Any:
    """transformers fills in what config.json leaves out, and knows the older spellings."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each family checks its own, and there is no one class of what they raise
        told = f"{base}: transformers refuses its config.json: {error}"
        raise JobFailed(told, hint="fetch the model's folder again, or mend config.json") from error


def _require_its_weights(base: Path, architecture: Architecture) -> None:
    tensors = tensors_of(base)
    odd = [name for name in tensors if not architecture.is_spare(name) and architecture.stored_name(name) is None]
    if odd:
        told = f"{base}: {_some(odd)} have no place in a GGUF of {architecture.name}"
        raise JobFailed(told, hint="take the model for text itself, as AutoModelForCausalLM saves it")
    missing = [f"{module}.weight" for module in architecture.names if f"{module}.weight" not in tensors]
    if missing:
        told = f"{base}: its weights lack {_some(missing)}"
        raise JobFailed(told, hint="fetch the whole folder; a whole model for text is what AutoModelForCausalLM saves")
    if architecture.tied and OUTPUT in tensors and not same_values(tensors[OUTPUT], tensors["model.embed_tokens.weight"]):
        told = f"{base}: config.json says that the output is the embedding, but its {OUTPUT} is another"
        raise JobFailed(told, hint='set "tie_word_embeddings": false in config.json, or fetch the folder again')


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _unknown(base: Path, kind: str) -> JobFailed:
    hint = WAYS_OUT.get(kind, "take a base of another family, or merge and convert it elsewhere and use the GGUF as a model")
    return JobFailed(f"{base}: the architecture {kind!r} cannot be exported (these can: {KNOWN})", hint=hint)


def _deviations(family: Family, config: Any, head_dim: int) -> Iterable[str]:
    """What this config says and llama.cpp has otherwise built in."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        yield f"its activation is {activation}, not {family.activation}"
    if family.square_heads and head_dim * config.num_attention_heads != config.hidden_size:
        yield f"{config.num_attention_heads} heads of {head_dim} are not its width of {config.hidden_size}"
    if family.always_tied and not config.tie_word_embeddings:
        yield "its output is not its embedding"
    if family.window_period:
        yield from _deviations_of_gemma(family, config, head_dim)


def _deviations_of_gemma(family: Family, config: Any, head_dim: int) -> Iterable[str]:
    layers, period = config.num_hidden_layers, family.window_period
    expected = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
    if list(config.layer_types) != expected:
        yield f"its windows do not come in the order of {period - 1} layers with and one without"
    scale = config.hidden_size // config.num_attention_heads if layers == family.scaled_by_width else head_dim
    if config.query_pre_attn_scalar != scale:
        yield f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scale}"
    if family.arch is gguf.MODEL_ARCH.GEMMA3 and (config.attn_logit_softcapping or config.final_logit_softcapping):
        yield "it caps its logits"
    if getattr(config, "use_bidirectional_attention", None):
        yield "it attends in both directions"


def _sizes(family: Family, config: Any, head_dim: int) -> Metadata:
    context, window = int(config.max_position_embeddings), _window(config)
    if window is not None and not family.window_period:
        context = min(context, window)
    keys: Metadata = {
        LLM.CONTEXT_LENGTH: context,
        LLM.EMBEDDING_LENGTH: config.hidden_size,
        LLM.BLOCK_COUNT: config.num_hidden_layers,
        LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        ATTENTION.HEAD_COUNT: config.num_attention_heads,
        ATTENTION.HEAD_COUNT_KV: config.num_key_value_heads or config.num_attention_heads,
        ATTENTION.KEY_LENGTH: head_dim,
        ATTENTION.VALUE_LENGTH: head_dim,
        ATTENTION.LAYERNORM_RMS_EPS: float(config.rms_norm_eps),
    }
    if family.window_period and window is not None:
        keys[ATTENTION.SLIDING_WINDOW] = window
    if family.arch is gguf.MODEL_ARCH.PHI3:
        keys[ATTENTION.SLIDING_WINDOW] = 0  # llama.cpp has taken a missing key for a window
    if family.arch is gguf.MODEL_ARCH.GEMMA2:
        # Absent, llama.cpp caps at 50 and 30; a cap that no logit comes near is none.
        keys[LLM.ATTN_LOGIT_SOFTCAPPING] = float(config.attn_logit_softcapping or 1e6)
        keys[LLM.FINAL_LOGIT_SOFTCAPPING] = float(config.final_logit_softcapping or 1e6)
    return keys


def _window(config: Any) -> int | None:
    """Tokens that a layer with a sliding window sees; None where no layer has one."""
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" not in types:
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def _positions(family: Family, config: Any, head_dim: int) -> tuple[Metadata, Tensors]:
    parameters = config.rope_parameters
    local = parameters.get("sliding_attention")
    if local is not None:  # gemma3: windows rotate in their own way, and never scaled
        if local.get("rope_type", "default") != "default":
            raise JobFailed("rope scaling in layers with a sliding window: llama.cpp has none", hint="take another base model")
        parameters = parameters["full_attention"]
    rotated = int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
    if rotated != head_dim and not family.partly_rotated:
        raise JobFailed("partial_rotary_factor: llama.cpp rotates whole heads here", hint="take another base model")
    keys, tensors = rope_of(parameters, int(config.max_position_embeddings), rotated, family.ropes)
    if local is not None:
        keys[gguf.Keys.Rope.FREQ_BASE_SWA] = float(local["rope_theta"])
    return keys, tensors
