"""Base model: a GGUF file or a Hugging Face folder. What is trained has its weights and splits text as llama.cpp does.

Reading one is light: the header of a file; of a folder its config, through transformers, and the headers of its weights.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from gguf import Keys

from config.contracts.base_name import FORM
from config.errors import JobFailed
from trainer_node.base_model import base_sha256, base_tag, model_name
from trainer_node.export.pre_tokenizers import by_name
from trainer_node.runtime.gguf_file import NotGguf, read_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")  # of a GGUF; those of a folder: export/architectures.py
SHORT_ROW = 256  # tokens; up to here plain attention is faster on a CPU than the fused kernel (a step: 1.5 s, 2.0 s)
EMBEDDING = "model.embed_tokens.weight"
LONG_FACTORS = "rope_factors_long.weight"  # with a context beyond the original one, llama.cpp rotates short texts by them, too


@dataclass(frozen=True)
class BaseModel:
    """A base and what its header or config says. Sizes are in parameters and tokens.

    `context`: what it can be trained and served with; of positions with two sets of factors, what the short ones are for.
    """

    path: Path
    name: str
    architecture: str
    layers: int
    hidden: int
    feed_forward: int
    context: int
    vocabulary: int
    parameters: int
    linear: tuple[tuple[int, int], ...]  # (in, out) of every matrix that LoRA adapts

    @cached_property
    def sha256(self) -> str:
        return base_sha256(self.path)

    @property
    def tag(self) -> str:
        """The name under which this very base is registered at the runtime."""
        return base_tag(self.sha256)

    def lora_parameters(self, rank: int) -> int:
        return sum(rank * (rows + columns) for rows, columns in self.linear)


def read_base(path: Path) -> BaseModel:
    """Read the header of a GGUF, or the config and the headers of the weights of a folder.

    Raises:
        JobFailed: neither, an adapter, or an architecture or a pre-tokenizer that cannot be trained here.
    """
    return _of_folder(path) if path.is_dir() else _of_gguf(path)


def _of_gguf(path: Path) -> BaseModel:
    try:
        header = read_gguf(path)
    except (OSError, NotGguf) as error:
        hint = f"`base` is a GGUF file, a Hugging Face folder, package:NAME or {FORM}"
        raise JobFailed(f"{path}: not a GGUF file: {error}", hint=hint) from error
    if header.is_adapter:
        raise JobFailed(f"{path}: holds an adapter, not a model", hint="`base` is a whole model")
    if header.architecture not in ARCHITECTURES:
        raise JobFailed(
            f"{path}: the architecture {header.architecture!r} cannot be trained",
            hint=f"these can: {', '.join(ARCHITECTURES)} (mistral is a llama in a GGUF)",
        )
    if header.metadata.get("tokenizer.ggml.model") != "llama":
        by_name(str(header.metadata.get("tokenizer.ggml.pre", "")))
    if header.metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1) > 1:
        raise JobFailed(f"{path}: is one of several parts", hint="join them first: llama-gguf-split --merge")
    if header.length("expert_count"):
        raise JobFailed(f"{path}: a mixture of experts cannot be trained", hint="take a dense model as `base`")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise JobFailed(f"{path}: its weights have no embedding", hint="`base` is a whole model")
    context = header.length("context_length")
    if LONG_FACTORS in shapes:
        context = min(context, header.length("rope.scaling.original_context_length") or context)
    return BaseModel(
        path=path,
        name=str(header.metadata.get("general.name", path.stem)),
        architecture=header.architecture,
        layers=header.length("block_count"),
        hidden=header.length("embedding_length"),
        feed_forward=header.length("feed_forward_length"),
        context=context,
        vocabulary=shapes["token_embd.weight"][1],
        parameters=sum(prod(shape) for name, shape in shapes.items() if not name.startswith("rope_")),
        linear=tuple((shape[0], shape[1]) for name, shape in shapes.items() if name.startswith("blk.") and len(shape) == 2),
    )


def _of_folder(path: Path) -> BaseModel:
    from trainer_node.export.architectures import architecture_of
    from trainer_node.export.weights import tensors_of

    found = architecture_of(path)
    shapes = {name: tensor.shape for name, tensor in tensors_of(path).items()}  # (out, in)
    sizes = {key: int(found.metadata[key]) for key in (Keys.LLM.EMBEDDING_LENGTH, Keys.LLM.FEED_FORWARD_LENGTH)}
    context = int(found.metadata[Keys.LLM.CONTEXT_LENGTH])
    if LONG_FACTORS in found.tensors:
        context = min(context, int(found.metadata[Keys.Rope.SCALING_ORIG_CTX_LEN]))
    return BaseModel(
        path=path,
        name=model_name(path),
        architecture=found.name,
        layers=found.layers,
        hidden=sizes[Keys.LLM.EMBEDDING_LENGTH],
        feed_forward=sizes[Keys.LLM.FEED_FORWARD_LENGTH],
        context=context,
        vocabulary=shapes[EMBEDDING][0],
        parameters=sum(prod(shape) for shape in shapes.values()),
        linear=tuple((shape[1], shape[0]) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2),
    )


def load_tokenizer(base: BaseModel) -> Any:
    """The base's tokenizer, splitting as llama.cpp does, with a padding token that is not the end token.

    Raises:
        JobFailed: a tokenizer that is not known here, without a chat template or without an end token.
    """
    from trainer_node.export.vocabulary import read_folder, read_gguf_vocabulary
    from trainer_node.train.tokenizer import build_tokenizer

    folder = base.path.is_dir()
    vocabulary = read_folder(base.path, base.vocabulary) if folder else read_gguf_vocabulary(base.path)
    try:
        return build_tokenizer(vocabulary, base.name)
    except JobFailed as error:
        raise JobFailed(f"{base.path}: {error}", hint=error.hint) from error


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that stand for control tokens: they may appear in no answer."""
    return list(tokenizer.rules.special)


def load_model(base: BaseModel, dtype: str, device: str, longest: int) -> Any:
    """The base with its weights in `dtype` ("float32" or "bfloat16") on `device`, trainable.

    Args:
        longest: tokens of the longest row it will see.
    """
    import torch

    from trainer_node.train.gguf_model import load_gguf

    attention = "eager" if device == "cpu" and longest <= SHORT_ROW else "sdpa"
    if base.architecture == "gemma2":
        attention = "eager"  # its attention caps the logits, which the fused kernel leaves out
    loaded = (_load_folder if base.path.is_dir() else load_gguf)(base.path, attention, dtype)
    loaded.config.use_cache = False
    for parameter in loaded.parameters():  # and not the buffers: positions are rotated in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return loaded.to(device)


def _load_folder(path: Path, attention: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(told["missing_keys"]):  # transformers draws them at random, and goes on
        raise JobFailed(f"{path}: its weights lack {', '.join(missing[:4])}", hint="fetch the whole folder again")
    model.config._name_or_path = ""  # a path of this node: peft would write it into the adapter
    return model
