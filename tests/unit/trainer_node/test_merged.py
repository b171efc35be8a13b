"""llama.cpp on what is exported computes what transformers computes on the merged model, for every family and way to adapt it.

HAFS_POSITIONS=500 asks for so many positions of each instead of a few, and logs the largest difference (--log-cli-level=INFO).
"""

import json
import logging
import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from config.errors import DiskFull, JobCancelled, JobFailed, StoreError
from tests.fakes.llama_cpp import require_equal, served_logprobs, whole_character
from tests.fakes.tiny_folders import LONG_FROM, ROWS, TINY, YARN, write_folder
from tests.fakes.tiny_model import smollm2_gguf, write_tiny_model
from trainer_node.export import writing
from trainer_node.export.adapter import export_adapter
from trainer_node.export.architectures import architecture_of
from trainer_node.export.forms import Say, make_form
from trainer_node.export.lora import WEIGHTS
from trainer_node.export.merged import export_merged
from trainer_node.export.register import Exported
from trainer_node.export.rope import rope_of
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


def tune(base: Path, lora: dict[str, Any], adapter: Path) -> Any:
    """Write a random adapter; the model with it merged in, by PEFT, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(5)
    options = peft.LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 6, "init_lora_weights": False} | lora))
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
    expected: Any,
    served: dict[str, tuple[Path, Path | None]],
    token: int,
    context: int,
    *,
    first: int = 1,
    length: int = LENGTH,
    below: int = 900,
) -> None:
    """Seeded texts of ids up to `below`; every prefix from `first` tokens on is a position."""
    draw = np.random.default_rng(7)
    left, worst, whole = POSITIONS, dict.fromkeys(served, 0.0), WHOLE
    while left > 0:
        ids = [1, *(int(id_) for id_ in draw.integers(5, below, length - 1))]
        step = 1 if POSITIONS >= 500 else (length - first) // POSITIONS
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
    expected = tune(base, LORAS[lora], adapter)
    export_merged(base, adapter, tmp_path / "merged.gguf", told)
    export_merged(base, None, tmp_path / "base.gguf", told)
    export_adapter(adapter, base, tmp_path / "adapter.gguf")
    served = {"merged": (tmp_path / "merged.gguf", None), "adapter": (tmp_path / "base.gguf", tmp_path / "adapter.gguf")}
    token = whole_character(base / "tokenizer.json")
    compare(expected, served, token, context=256)
    if name == "phi3-long":  # llama.cpp decides by its context which divisors it takes, transformers by the text's length
        compare(expected, served, token, context=2 * LONG_FROM, first=LONG_FROM + 1, length=LONG_FROM + 64)


@pytest.mark.parametrize("name", list(TINY))
def test_a_gguf_as_base_gives_the_same_file(name: str, tmp_path: Path) -> None:
    base, adapter = write_folder(name, tmp_path / "base"), tmp_path / "adapter"
    tune(base, LORAS["patterns"], adapter)
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
    expected = tune(base, {"target_modules": ["lm_head", "v_proj"]}, adapter)
    export_merged(base, adapter, tmp_path / "merged.gguf", told)
    export_merged(base, None, tmp_path / "base.gguf", told)
    export_adapter(adapter, base, tmp_path / "adapter.gguf")
    served = {"merged": (tmp_path / "merged.gguf", None), "adapter": (tmp_path / "base.gguf", tmp_path / "adapter.gguf")}
    compare(expected, served, whole_character(base / "tokenizer.json"), context=256)


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The same folder with its weights changed, in one file."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors*")):
        weights |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    change(weights)
    save_file(weights, base / "model.safetensors")
    return base


def adapt_output(adapter: Path, base: Path) -> Path:
    """A LoRA of the output layer alone."""
    rows = torch.ones(ROWS, 2)
    columns = torch.ones(2, json.loads((base / "config.json").read_bytes())["hidden_size"])
    adapter.mkdir()
    halves = {"A": columns, "B": rows}
    save_file({f"base_model.model.lm_head.lora_{half}.weight": values for half, values in halves.items()}, adapter / WEIGHTS)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return adapter


@pytest.mark.parametrize(
    ("name", "change", "told_of"),
    [
        ("qwen2", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj.weight"),
        ("qwen3", lambda weights: weights.pop("model.layers.2.self_attn.k_norm.weight"), "k_norm"),
        ("phi3-long", lambda weights: weights.pop("lm_head.weight"), "lack lm_head.weight"),
        ("qwen2-yarn", lambda weights: weights.pop("model.embed_tokens.weight"), "lack model.embed_tokens.weight"),
        ("qwen2", lambda weights: weights.update({"score.weight": torch.ones(2, 96)}), "score.weight have no place"),
        ("qwen3", lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(192)}), "q_proj.bias"),
        ("qwen2-yarn", lambda weights: weights.update({"lm_head.weight": torch.ones(ROWS, 96)}), "is another"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_before_training(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], told_of: str, tmp_path: Path
) -> None:
    base = rewrite(write_folder(name, tmp_path / "base"), change)
    with pytest.raises(JobFailed, match=told_of) as refused:
        read_base(base)
    assert refused.value.hint


def test_what_a_checkpoint_holds_beside_the_model_is_left_away(tmp_path: Path) -> None:
    """A copy of the embedding as the output, and the frequencies that a model computes."""
    base = write_folder("llama-llama3", tmp_path / "base")
    export_merged(base, None, tmp_path / "plain.gguf", told)
    rewrite(base, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    rewrite(base, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    export_merged(base, None, tmp_path / "spare.gguf", told)
    assert contents(tmp_path / "spare.gguf") == contents(tmp_path / "plain.gguf")


def test_of_one_file_and_of_shards_what_is_trained_is_exported(tmp_path: Path) -> None:
    base = write_folder("qwen2", tmp_path / "base")
    other = write_folder("qwen2", tmp_path / "other", seed=1, shard="5GB")
    (other / "model.safetensors").rename(base / "model.safetensors")
    assert (base / "model.safetensors.index.json").is_file()
    trained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model.layers[1].mlp.up_proj.weight
    export_merged(base, None, tmp_path / "base.gguf", told, dtype="F32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    assert np.array_equal(found["blk.1.ffn_up.weight"], trained.detach().numpy())


def test_an_output_that_is_the_embedding_is_not_adapted(tmp_path: Path) -> None:
    """Also where the checkpoint has a copy of it: that is not exported, so what is added to it would be lost."""
    base = write_folder("qwen2-yarn", tmp_path / "base")
    rewrite(base, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    adapter = adapt_output(tmp_path / "adapter", base)
    with pytest.raises(JobFailed, match="adapts lm_head, which the base does not have"):
        export_merged(base, adapter, tmp_path / "merged.gguf", told)
    with pytest.raises(JobFailed, match="adapts lm_head, which the base does not have"):
        export_adapter(adapter, base, tmp_path / "adapter.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_has_diverged_is_refused(value: float, tmp_path: Path) -> None:
    base = write_folder("qwen2", tmp_path / "base")
    adapter = adapt_output(tmp_path / "adapter", base)
    matrices = load_file(adapter / WEIGHTS)
    matrices["base_model.model.lm_head.lora_B.weight"][1000, 1] = value
    save_file(matrices, adapter / WEIGHTS)
    for dtype in ("F16", "BF16", "F32"):
        with pytest.raises(JobFailed, match="no number"):
            export_merged(base, adapter, tmp_path / "merged.gguf", told, dtype=dtype)
    with pytest.raises(JobFailed, match=r"lm_head\.weight has values that are no numbers"):
        export_adapter(adapter, base, tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_shard_that_was_not_fetched_to_its_end_is_refused_by_its_header(tmp_path: Path) -> None:
    base = write_folder("qwen2", tmp_path / "base")
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(JobFailed, match=shard.name) as refused:
            read_base(base)
        assert "fetch it again" in refused.value.hint


def test_a_gguf_that_was_not_fetched_to_its_end_is_refused_by_its_header(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 30, 500, 20_000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(JobFailed, match="not a whole GGUF") as refused:
            architecture_of(cut)
        assert refused.value.hint


def test_an_empty_list_in_the_header_of_a_gguf_is_left_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs write such; the gguf package refuses to."""
    pack = gguf.GGUFWriter._pack_val
    empty = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, 0)
    with monkeypatch.context() as patched:
        patched.setattr(
            gguf.GGUFWriter,
            "_pack_val",
            lambda writer, value, *rest, **more: empty if value == [] else pack(writer, value, *rest, **more),
        )
        patched.setattr(
            gguf.GGUFWriter,
            "add_add_space_prefix",
            lambda writer, _: writer.add_key_value("general.tags", [], gguf.GGUFValueType.ARRAY),
        )
        base = write_tiny_model(tmp_path / "tiny.gguf")
    assert gguf.GGUFReader(base).fields["general.tags"].contents() == []
    export_merged(base, None, tmp_path / "merged.gguf", told)
    assert "general.tags" not in gguf.GGUFReader(tmp_path / "merged.gguf").fields


@pytest.mark.parametrize("changes", [{"hidden_size": 97}, {"hidden_size": "wide"}, {"rope_parameters": {"rope_type": "yarn"}}])
def test_a_config_that_transformers_refuses_is_refused_by_its_folder(changes: dict[str, Any], tmp_path: Path) -> None:
    base = write_folder("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(JobFailed, match="base: transformers refuses its config.json") as refused:
        read_base(base)
    assert refused.value.hint


@pytest.mark.parametrize("changes", [{"beta_fast": 16.0}, {"beta_slow": 2.0}, {"truncate": False}])
def test_a_range_of_yarn_that_llama_cpp_does_not_read_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    base = write_folder("llama-yarn", tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    config["rope_parameters"] |= changes
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(JobFailed, match=f"base: rope scaling 'yarn' with {next(iter(changes)).split('_')[0]}") as refused:
        read_base(base)
    assert refused.value.hint


@pytest.mark.parametrize(
    "changes", [{}, {"factor": 1.0}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"mscale": 0.7}]
)
def test_yarn_scales_attention_as_transformers_does(changes: dict[str, Any]) -> None:
    """llama.cpp multiplies what it is told by its own 1 + 0.1 ln(factor): the test above shows that for one."""
    config = CONFIG_MAPPING["llama"](hidden_size=96, num_attention_heads=6, rope_parameters=YARN | changes)
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    keys, _ = rope_of(config.rope_parameters, 256, 16, ("yarn",))
    factor = keys["{arch}.rope.scaling.factor"]
    assert keys.get("{arch}.rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor)) == pytest.approx(expected)


def test_while_a_gguf_is_made_no_other_is_made_of_the_same(tmp_path: Path) -> None:
    """They share the one of 16 bits that is between: two at once would write into one file."""
    base = write_folder("qwen2", tmp_path / "base")
    adapter = adapt_output(tmp_path / "adapter", base)
    refused = []

    def make(kind: str, say: Say) -> Exported:
        return make_form("merged", kind, base=base, adapter=adapter, folder=tmp_path / "made", say=say)

    def another(step: str, done: int, total: int) -> None:
        with pytest.raises(JobFailed, match="another GGUF is being made") as error:
            make("Q5_1", quiet)
        refused.append(error.value.hint)

    assert (tmp_path / "made" / make("Q8_0", another).file).is_file()
    assert refused and all(refused)
    assert (tmp_path / "made" / make("Q5_1", quiet).file).is_file()
    assert {path.suffix for path in (tmp_path / "made" / "gguf").iterdir()} == {".gguf"}


def quiet(step: str, done: int, total: int) -> None:
    pass


def test_an_earlier_folder_stays_where_the_new_one_cannot_take_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    (target / "a").write_text("earlier")

    def refuse(source: Path, to: Path) -> None:
        if source.name == "merged.partial":
            raise PermissionError(13, "in use", str(source))
        source.rename(to)

    monkeypatch.setattr(writing, "replace", refuse)
    with pytest.raises(StoreError), writing.whole_folder(target, 1) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [target]


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_that_ends_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    import resource

    base = write_folder("qwen2", tmp_path / "base")
    export_merged(base, None, tmp_path / "whole.gguf", told)
    whole = (tmp_path / "whole.gguf").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1_000, whole // 2, whole - 1):  # in the header, in the weights, in the last of them
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(StoreError, match=r"model\.gguf"):
                export_merged(base, None, tmp_path / "target" / "model.gguf", told)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list((tmp_path / "target").iterdir()) == []


def test_what_a_crash_left_is_written_anew(tmp_path: Path) -> None:
    base = write_folder("qwen2", tmp_path / "base")
    export_merged(base, None, tmp_path / "whole.gguf", told)
    (tmp_path / "again.gguf.partial").write_bytes(b"x" * 10**7)
    export_merged(base, None, tmp_path / "again.gguf", told)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "again.gguf.partial").exists()


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
