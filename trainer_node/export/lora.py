"""A PEFT adapter as numbers: of each module W becomes W + scale * B A. What is more than that is refused by name.

- The scale is the module's own: alpha / rank, or alpha / sqrt(rank) with rsLoRA, alpha from alpha_pattern as PEFT matches it; the
  rank is that of the stored matrices.
- An option that this file has not heard of is taken for one that changes the arithmetic if it is set.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import JobFailed
from trainer_node.export.weights import Tensor, tensors_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_ALPHA = 8  # what an adapter_config.json without one means
MERGE = "merge it with PEFT (merge_and_unload, save_pretrained) and use that folder as base"
DIVERGED = "its training has diverged: train again, with a lower learning rate"
HARMLESS = {  # read here, or they say how it was trained
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora"),
    *("ensure_weight_tying", "eva_config", "runtime_config"),
}
# These leave the base's weights as they are; PiSSA, OLoRA, CorDA and LoftQ do not.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: scale * b a, with a (rank, in) and b (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def size(self) -> int:
        """Bytes of both, as float32."""
        return 4 * (self.a.shape[0] * self.a.shape[1] + self.b.shape[0] * self.b.shape[1])


def read_adapter(folder: Path, base: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """What the adapter adds to the weights of `base`, by their names there, such as `model.layers.0.mlp.up_proj.weight`.

    Raises:
        JobFailed: no LoRA, one that adds something else than a product of two matrices, or one of another base.
    """
    config = adapter_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise JobFailed(f"{folder}: has no {WEIGHTS}", hint="save the adapter as safetensors")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors_in(weights).items():
        module, _, half = key.removeprefix(PREFIX).rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or len(tensor.shape) != 2:
            raise JobFailed(f"{folder}: {key} is no part of a plain LoRA of a linear layer", hint=MERGE)
        halves.setdefault(module, {})[half[0]] = tensor
    if not halves:
        raise JobFailed(
            f"{weights}: holds no matrices", hint="save the adapter again: save_pretrained of the model with its adapter"
        )
    return {f"{module}.weight": _low_rank(folder, module, both, config, base) for module, both in halves.items()}


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, once it is clear that the arithmetic covers it. Raises JobFailed."""
    try:
        config = dict(json.loads((folder / CONFIG).read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise JobFailed(f"{folder}: has no readable {CONFIG}: {error}", hint="give the folder of a PEFT adapter") from error
    if config.get("peft_type", "LORA") != "LORA":
        raise JobFailed(f"{folder}: is {config['peft_type']}, not LoRA", hint=MERGE)
    refused = [key for key, value in config.items() if value and key not in HARMLESS]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    how = config.get("init_lora_weights", True)
    if isinstance(how, str) and not how.startswith(PLAIN_STARTS):
        refused.append(f"init_lora_weights = {how!r}, which changes the base's weights too")
    if refused:
        raise JobFailed(f"{folder}: is not a plain LoRA: {', '.join(refused)}", hint=MERGE)
    return {"lora_alpha": PEFT_ALPHA} | config


def _low_rank(
    folder: Path, module: str, both: Mapping[str, Tensor], config: Mapping[str, Any], base: Mapping[str, Tensor]
) -> LowRank:
    weight = base.get(f"{module}.weight")
    if weight is None:
        raise JobFailed(f"{folder}: adapts {module}, which the base does not have of its own", hint="adapt other layers")
    shapes = [both[half].shape for half in ("A", "B") if half in both]
    rank = shapes[0][0]
    if shapes != [(rank, weight.columns), (weight.shape[0], rank)]:
        raise JobFailed(
            f"{folder}: its matrices {shapes} do not fit {module} with {weight.shape}", hint="give the base it was trained on"
        )
    alpha = float(_of_module(folder, config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    return LowRank(both["A"], both["B"], alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of_module(folder: Path, patterns: Mapping[str, float], module: str, default: float) -> float:
    """As PEFT: a pattern matches the end of the name, from a dot on."""
    found = {value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)}
    if len(found) > 1:
        hint = "PEFT takes the first, but saves them sorted: write an alpha_pattern in which one matches"
        raise JobFailed(f"{folder}: {module} matches several of its alpha_pattern", hint=hint)
    return found.pop() if found else default
