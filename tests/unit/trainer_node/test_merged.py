"""llama.cpp on what is exported computes what transformers computes on the merged model, for every family and way to adapt it.

HAFS_POSITIONS=500 asks for so many positions of each instead of a few, and logs the largest difference (--log-cli-level=INFO).
"""

import logging
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from config.errors import DiskFull, JobCancelled, JobFailed
from tests.fakes.llama_cpp import require_equal, served_logprobs, whole_character
from tests.fakes.tiny_folders import TINY, write_folder
from tests.fakes.tiny_model import smollm2_gguf
from trainer_node.export import writing
from trainer_node.export.adapter import export_adapter
from trainer_node.export.merged import export_merged
from trainer_node.train.base import load_model, load_tokenizer, read_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers so
    pytest.mark.filterwarnings("ignore:.*rank_pattern.*:UserWarning"),  # rsLoRA with patterns: peft would rather not
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),  # not every family has a q_proj
]
log = logging.getLogger("test")
POSITIONS = int(os.environ.get("HAFS_POSITIONS", "12"))
WHOLE = 20 if POSITIONS >= 500 else 2  # of them with the whole vocabulary, the others with the 50 likeliest
LENGTH = 120
ALL = "all-linear"
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "partial": {"target_modules": r".*layers\.[12]\.(self_attn\.(q_proj|qkv_proj|o_proj)|mlp\.down_proj)"},
    "patterns": {
        "target_modules": ALL,
        "use_rslora": True,
        "alpha_pattern": {"o_proj": 3, r"layers\.[02]\.mlp\.down_proj": 40, r".*\.[qkv]+_proj": 5},
        "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\..*": 3},
    },
}
CASES = [(name, list(LORAS)[number % len(LORAS)]) for number, name in enumerate(TINY)]


def told(done: int, total: int) -> None:
    assert 0 < done <= total


def tune(base: Path, lora: str, adapter: Path) -> Any:
    """Write a random adapter; the model with it merged in, by PEFT, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(5)
    options = peft.LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 6, "init_lora_weights": False} | LORAS[lora]))
    tuned = peft.get_peft_model(model, options)
    with torch.no_grad():
        for name, values in tuned.named_parameters():
            if "lora_" in name:
                values *= 0.5  # so that base and adapter matter alike
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    return tuned.merge_and_unload().eval()


def logprobs(model: Any, ids: list[int]) -> np.ndarray:
    """(length, rows)"""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


def compare(
    expected: Any, served: dict[str, tuple[Path, Path | None]], token: int, context: int, *, first: int = 1, below: int = 900
) -> None:
    """Seeded texts of ids up to `below`; every prefix from `first` tokens on is a position."""
    draw = np.random.default_rng(7)
    left, worst, whole = POSITIONS, dict.fromkeys(served, 0.0), WHOLE
    length = min(LENGTH, context - 2)
    while left > 0:
        ids = [1, *(int(id_) for id_ in draw.integers(5, below, length - 1))]
        step = 1 if POSITIONS >= 500 else length // POSITIONS
        ends = list(range(first, length, step))[:left]
        rows = logprobs(expected, ids)
        for name, (model, adapter) in served.items():
            for some, top in ((ends[:whole], rows.shape[1]), (ends[whole:], 50)):
                found = served_logprobs(model, ids, some, forced=token, top=top, adapter=adapter, context=context) if some else []
                shares = [require_equal(each, rows[end - 1]) for end, each in zip(some, found, strict=True)]
                worst[name] = max(worst[name], *shares, 0.0)
        left, whole = left - len(ends), max(whole - len(ends), 0)
    log.info("%s", {name: f"{share:.5f} of the range" for name, share in worst.items()})


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_llama_cpp_computes_what_transformers_computes(name: str, lora: str, tmp_path: Path) -> None:
    base, adapter = write_folder(name, tmp_path / "base"), tmp_path / "adapter"
    expected = tune(base, lora, adapter)
    export_merged(base, adapter, tmp_path / "merged.gguf", told)
    export_merged(base, None, tmp_path / "base.gguf", told)
    export_adapter(adapter, base, tmp_path / "adapter.gguf")
    served = {"merged": (tmp_path / "merged.gguf", None), "adapter": (tmp_path / "base.gguf", tmp_path / "adapter.gguf")}
    token = whole_character(base / "tokenizer.json")
    if name == "phi3-long":  # llama.cpp decides by its context which divisors it takes, transformers by the text's length
        compare(expected, served, token, context=64)
        compare(expected, served, token, context=256, first=66)
    else:
        compare(expected, served, token, context=256)


@pytest.mark.parametrize("name", list(TINY))
def test_a_gguf_as_base_gives_the_same_file(name: str, tmp_path: Path) -> None:
    base, adapter = write_folder(name, tmp_path / "base"), tmp_path / "adapter"
    tune(base, "patterns", adapter)
    export_merged(base, adapter, tmp_path / "folder.gguf", told)
    export_merged(base, None, tmp_path / "base.gguf", told, dtype="F32")
    export_merged(tmp_path / "base.gguf", adapter, tmp_path / "gguf.gguf", told)
    for file, source in (("a.gguf", base), ("b.gguf", tmp_path / "base.gguf")):
        export_adapter(adapter, source, tmp_path / file)
    assert contents(tmp_path / "gguf.gguf") == contents(tmp_path / "folder.gguf")
    assert contents(tmp_path / "a.gguf") == contents(tmp_path / "b.gguf")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return keys, {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}


def test_smollm2(tmp_path: Path) -> None:
    """The real one, from its quantized GGUF, with a random adapter."""
    base = read_base(smollm2_gguf())
    model = load_model(base, "float32", "cpu", longest=64)
    torch.manual_seed(3)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=ALL, init_lora_weights=False)
    tuned = peft.get_peft_model(model, options)
    with torch.no_grad():
        for name, values in tuned.named_parameters():
            if "lora_" in name:
                values *= 0.1
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    export_merged(base.path, tmp_path / "adapter", tmp_path / "merged.gguf", told)
    export_merged(base.path, None, tmp_path / "base.gguf", told)
    export_adapter(tmp_path / "adapter", base.path, tmp_path / "adapter.gguf")
    served = {"merged": (tmp_path / "merged.gguf", None), "adapter": (tmp_path / "base.gguf", tmp_path / "adapter.gguf")}
    token = load_tokenizer(base).convert_tokens_to_ids("e")
    compare(tuned.merge_and_unload().eval(), served, token, context=256, below=49_000)


def test_an_untied_output_can_be_adapted(tmp_path: Path) -> None:
    base, adapter = write_folder("qwen2", tmp_path / "base"), tmp_path / "adapter"
    LORAS["output"] = {"target_modules": ["lm_head", "v_proj"]}
    expected = tune(base, "output", adapter)
    export_merged(base, adapter, tmp_path / "merged.gguf", told)
    export_merged(base, None, tmp_path / "base.gguf", told)
    export_adapter(adapter, base, tmp_path / "adapter.gguf")
    served = {"merged": (tmp_path / "merged.gguf", None), "adapter": (tmp_path / "base.gguf", tmp_path / "adapter.gguf")}
    compare(expected, served, whole_character(base / "tokenizer.json"), context=256)


def test_a_stop_leaves_nothing(tmp_path: Path) -> None:
    base = write_folder("qwen2", tmp_path / "base")

    def stop(done: int, total: int) -> None:
        raise JobCancelled("stopped")

    (tmp_path / "target").mkdir()
    with pytest.raises(JobCancelled):
        export_merged(base, None, tmp_path / "target" / "model.gguf", stop)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_full_disk_is_refused_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_folder("qwen2", tmp_path / "base")
    monkeypatch.setattr(writing, "SPARE_BYTES", 2**60)
    with pytest.raises(DiskFull):
        export_merged(base, None, tmp_path / "target" / "model.gguf", told)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_weight_beyond_f16_is_refused_and_fits_bf16(tmp_path: Path) -> None:
    base = write_folder("qwen2", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 7e4
    model.save_pretrained(base, max_shard_size="300KB")
    with pytest.raises(JobFailed, match="too large for F16"):
        export_merged(base, None, tmp_path / "f16.gguf", told)
    export_merged(base, None, tmp_path / "bf16.gguf", told, dtype="BF16")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "bf16.gguf").tensors}["blk.1.ffn_up.weight"]
    expected = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    assert np.array_equal(gguf.dequantize(found.data, found.tensor_type), expected)
