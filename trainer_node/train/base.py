"""Base model: a GGUF file. What is trained has the weights of the file and splits text as llama.cpp does.

transformers reads a GGUF but marks the model as quantized and not trainable, and builds a tokenizer that splits
text in its own way: both are mended here, and nowhere else.
"""

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import gguf

from config.contracts.base_name import FORM
from config.errors import JobFailed
from trainer_node.base_model import base_tag

ARCHITECTURES = ("llama",)
DIGITS_THEN_BYTES = ("smollm",)  # tokenizer.ggml.pre: each digit alone, then bytes
SHORT_ROW = 256  # tokens; up to here plain attention is faster on a CPU than the fused kernel (a step: 1.5 s, 2.0 s)
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class BaseModel:
    """A GGUF file and what its header says. Sizes are in parameters and tokens."""

    path: Path
    name: str
    architecture: str
    pre_tokenizer: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    context: int
    vocabulary: int
    parameters: int
    linear: tuple[tuple[int, int], ...]  # (in, out) of every matrix that LoRA adapts

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def tag(self) -> str:
        """The name under which this very file is registered at the runtime."""
        return base_tag(self.sha256)

    def lora_parameters(self, rank: int) -> int:
        return sum(rank * (rows + columns) for rows, columns in self.linear)


def read_base(path: Path) -> BaseModel:
    """Read the header of a GGUF.

    Raises:
        JobFailed: no GGUF, an adapter, or an architecture or a pre-tokenizer that cannot be trained here.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise JobFailed(f"{path}: not a GGUF file: {error}", hint=f"`base` is a GGUF file, package:NAME or {FORM}") from error
    wanted = ("general.", "llama.", "tokenizer.ggml.pre")  # not the lists of the vocabulary: they take seconds
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith(wanted)}
    architecture = str(fields.get("general.architecture", ""))
    pre = str(fields.get("tokenizer.ggml.pre", ""))
    if fields.get("general.type") == "adapter":
        raise JobFailed(f"{path}: holds an adapter, not a model", hint="`base` is a whole model")
    if architecture not in ARCHITECTURES:
        raise JobFailed(
            f"{path}: the architecture {architecture!r} cannot be trained", hint=f"these can: {', '.join(ARCHITECTURES)}"
        )
    if pre not in DIGITS_THEN_BYTES:
        raise JobFailed(
            f"{path}: the pre-tokenizer {pre!r} is not known here, training and serving would split text differently",
            hint=f"bases with these can be trained: {', '.join(DIGITS_THEN_BYTES)}",
        )
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    return BaseModel(
        path=path,
        name=str(fields.get("general.name", path.stem)),
        architecture=architecture,
        pre_tokenizer=pre,
        layers=fields["llama.block_count"],
        hidden=fields["llama.embedding_length"],
        feed_forward=fields["llama.feed_forward_length"],
        heads=fields["llama.attention.head_count"],
        kv_heads=fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]),
        context=fields["llama.context_length"],
        vocabulary=shapes["token_embd.weight"][1],
        parameters=sum(prod(shape) for shape in shapes.values()),
        linear=tuple((shape[0], shape[1]) for name, shape in shapes.items() if name.split(".")[-2] in LINEAR),
    )


def load_tokenizer(base: BaseModel) -> Any:
    """The base's tokenizer, splitting as llama.cpp does, with a padding token that is not the end token."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path.parent, gguf_file=base.path.name)
    # transformers builds a plain ByteLevel, which differs from llama.cpp's smollm on whitespace before digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if not tokenizer.chat_template or tokenizer.eos_token is None:
        raise JobFailed(f"{base.path}: has no chat template or no end token", hint="take an instruct model as base")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = [token for token in [tokenizer.unk_token, *special_tokens(tokenizer)] if token and token != tokenizer.eos_token]
        tokenizer.pad_token = others[0]
    return tokenizer


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that stand for control tokens: they may appear in no message and in no answer."""
    return [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]


def load_model(base: BaseModel, dtype: str, device: str, longest: int) -> Any:
    """The base with its weights in `dtype` ("float32" or "bfloat16") on `device`, trainable.

    Args:
        longest: tokens of the longest row it will see.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(base.path.parent, gguf_file=base.path.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # Trainer refuses what was "quantized" (transformers: is_quantized)
    config._name_or_path = ""  # else peft looks for a config.json beside the GGUF, and warns
    attention = "eager" if device == "cpu" and longest <= SHORT_ROW else "sdpa"
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.config.use_cache = False
    return fresh.to(device=device, dtype=getattr(torch, dtype))
