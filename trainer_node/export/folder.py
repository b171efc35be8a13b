"""A Hugging Face folder of base and adapter, for transformers and vLLM: their weights merged, everything else as the base has it.

- Weights keep the base's own dtype; those of a quantized GGUF become F16. Shards and their index are named as the hub names them.
- Its chats begin as in training: a BOS that only the tokenizer knows of, which adds none to a chat, goes into the template.
- Nothing of the base's code is carried over (`auto_map`): every architecture here is one that transformers and vLLM know.
- A GGUF gives a folder with the config that it was trained with (`train/gguf_model.py`); what no config can say is refused.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer_node.export.architectures import Architecture, Arrange, architecture_of, model_tensors, unchanged
from trainer_node.export.lora import read_adapter
from trainer_node.export.pieces import Weight, one_thread_a_piece
from trainer_node.export.weights import INDEX, LENGTH_BYTES, SAFETENSORS, SINGLE, Kind
from trainer_node.export.writing import Told, in_order, whole_folder
from trainer_node.train.base import load_tokenizer, read_base

SHARD_BYTES = 5 * 10**9
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
COPIED = (
    GENERATION,
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", TEMPLATE, "chat_template.json", "tekken.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE"),
)
EMBEDDING = "model.embed_tokens.weight"
DTYPES = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
Shard = dict[str, Weight]


def export_folder(base: Path, adapter: Path | None, target: Path, told: Told) -> None:
    """Write base and adapter as a folder with config, tokenizer, chat template, generation config and safetensors.

    Args:
        base: a GGUF file or a Hugging Face folder.
        adapter: the folder of a PEFT LoRA; None writes the base alone.
        told: told bytes written and bytes in all.

    Raises:
        JobFailed: an architecture or an adapter that cannot be written so.
        DiskFull, StoreError: the target cannot be.
    """
    weights = _merged(base, adapter, architecture_of(base))
    shards = list(_sharded(weights))
    size = sum(weight.size for weight in weights.values())
    dtype = DTYPES[weights[EMBEDDING].kind]
    with whole_folder(target, size) as folder:
        tokenizer = load_tokenizer(read_base(base))
        if base.is_dir():
            _describe(base, folder, dtype)
        else:
            _rebuild(base, tokenizer, folder, dtype)
        _begin_chats(tokenizer, folder)
        names = _names(len(shards))
        done = 0
        for name, shard in zip(names, shards, strict=True):
            done = _write_shard(folder / name, shard, done, partial(_tell, told, size))
        if len(shards) > 1:
            _write_index(folder / INDEX, dict(zip(names, shards, strict=True)), size)


def _tell(told: Told, size: int, done: int) -> None:
    told(done, size)


def _merged(base: Path, adapter: Path | None, architecture: Architecture) -> dict[str, Weight]:
    """The weights by their names in transformers, in its order of rows."""
    tensors = model_tensors(base, architecture)
    added = read_adapter(adapter, tensors) if adapter is not None else {}
    return {
        name: Weight(
            tensor,
            tensor.kind if tensor.kind in SAFETENSORS.values() else Kind.F16,
            added.get(name),
            arrange=unchanged if base.is_dir() else _back(architecture, name),
            unit=1 if architecture.stored_order(name) is unchanged else architecture.head_dim,
        )
        for name, tensor in tensors.items()
        if not name.startswith("rope_")  # of a GGUF: here the config says it
    }


def _back(architecture: Architecture, name: str) -> Arrange:
    """From the GGUF's order to that of transformers."""
    if architecture.norm_shift and name.endswith("norm.weight"):
        return lambda rows: rows - np.float32(architecture.norm_shift)
    return unchanged if architecture.stored_order(name) is unchanged else architecture.separate


def _sharded(weights: dict[str, Weight]) -> Iterator[Shard]:
    shard: Shard = {}
    for name, weight in weights.items():
        if shard and sum(other.size for other in shard.values()) + weight.size > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = weight
    yield shard


def _names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _write_shard(path: Path, shard: Shard, done: int, tell: Any) -> int:
    """Returns the bytes done, this shard's included."""
    written = {kind: name for name, kind in SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, weight in shard.items():
        end = offset + weight.size
        header[name] = {"dtype": written[weight.kind], "shape": list(weight.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # the weights begin at an aligned byte
    with path.open("wb") as file, one_thread_a_piece():
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for piece in in_order(call for weight in shard.values() for call in weight.pieces()):
            file.write(piece)
            done += piece.nbytes
            tell(done)
    return done


def _write_index(path: Path, shards: dict[str, Shard], size: int) -> None:
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    path.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))


def _describe(base: Path, folder: Path, dtype: str) -> None:
    """The base's own files. The config asks for no code of its own, and names its class and the kind of its weights."""
    for name in COPIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    config = json.loads((base / CONFIG).read_bytes())
    config.pop("auto_map", None)
    config["architectures"] = [_class_of(config["model_type"])]
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["dtype"] = dtype
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _rebuild(base: Path, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Config and tokenizer that training used."""
    from transformers import GenerationConfig

    from trainer_node.train.gguf_model import config_of

    config = config_of(base)
    config.architectures = [_class_of(config.model_type)]
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def _begin_chats(tokenizer: Any, folder: Path) -> None:
    bos = tokenizer.rules.bos
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    if not chat.startswith(bos):
        text = "{{ " + json.dumps(bos, ensure_ascii=False) + " }}" + tokenizer.chat_template
        (folder / TEMPLATE).write_text(text, encoding="utf-8")


def _class_of(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
