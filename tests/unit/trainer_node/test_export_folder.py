"""The exported folder is one that transformers loads with the merged model's logits, and that has every file vLLM reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config.contracts.sample import Message
from config.errors import JobCancelled, JobFailed
from tests.fakes.tiny_folders import TINY, write_folder
from tests.fakes.tiny_model import write_tiny_model
from trainer_node.export import folder as exporting
from trainer_node.export.architectures import architecture_of
from trainer_node.export.folder import export_folder
from trainer_node.export.merged import export_merged
from trainer_node.export.rope import rope_of
from trainer_node.train import gguf_model
from trainer_node.train.base import load_model, load_tokenizer, read_base
from trainer_node.train.encode import render_prompt

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers so
]
IDS = [1, 99, 105, 740, 198, 50, 85, 278, 431, 721, 30, 2, 198]


def told(done: int, total: int) -> None:
    assert 0 < done <= total


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].float().numpy()


def write_adapter(base: Path, adapter: Path) -> Any:
    """The merged model in the base's dtype, by PEFT in float32."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, options)
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    return tuned.merge_and_unload().to(torch.bfloat16).float().eval()


@pytest.mark.parametrize("name", ["llama-llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3-long"])
def test_transformers_loads_the_merged_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "SHARD_BYTES", 500_000)
    base, target = write_folder(name, tmp_path / "base"), tmp_path / "target"
    expected = write_adapter(base, tmp_path / "adapter")
    export_folder(base, tmp_path / "adapter", target, told)
    loaded, info = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.dtype == torch.bfloat16
    found, wanted = logits(loaded.float().eval()), logits(expected)
    assert np.abs(found - wanted).max() < 2e-2 * (wanted.max() - wanted.min())
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.9
    index = json.loads((target / "model.safetensors.index.json").read_bytes())
    shards = {path.name for path in target.glob("*.safetensors")}
    assert len(shards) > 1 and set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == 2 * sum(values.numel() for values in loaded.parameters())


@pytest.mark.parametrize("name", list(TINY))
def test_without_an_adapter_every_weight_is_the_bases(name: str, tmp_path: Path) -> None:
    base, target = write_folder(name, tmp_path / "base"), tmp_path / "target"
    export_folder(base, None, target, told)
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in (base, target))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_what_vllm_reads_is_there(tmp_path: Path) -> None:
    base, target = write_folder("phi3", tmp_path / "base"), tmp_path / "target"
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (base / "evil.py").write_text("raise SystemExit")
    (base / "pytorch_model.bin").write_bytes(b"x")
    (base / "LICENSE").write_text("MIT")
    target.mkdir()
    (target / "old.safetensors").write_bytes(b"of an earlier export")
    export_folder(base, None, target, told)
    assert {path.name for path in target.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    written = json.loads((target / "config.json").read_bytes())
    assert written == config and written["architectures"] == ["Phi3ForCausalLM"]
    chat = [{"role": "user", "content": "a"}]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, target)]
    assert tokenizers[0].apply_chat_template(chat) == tokenizers[1].apply_chat_template(chat)
    assert GenerationConfig.from_pretrained(target).eos_token_id == GenerationConfig.from_pretrained(base).eos_token_id


@pytest.mark.parametrize("name", list(TINY))
def test_a_gguf_gives_the_folder_it_came_from(name: str, tmp_path: Path) -> None:
    """The same logits to float32's rounding: config, order of rows and shift of norms are all told back."""
    base, target = write_folder(name, tmp_path / "base"), tmp_path / "target"
    export_merged(base, None, tmp_path / "base.gguf", told, dtype="BF16")
    export_folder(tmp_path / "base.gguf", None, target, told)
    loaded, info = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.dtype == torch.bfloat16 and loaded.config.architectures == [type(loaded).__name__]
    before, after = (AutoModelForCausalLM.from_pretrained(where).float().eval() for where in (base, target))
    found, wanted = logits(after), logits(before)
    assert np.abs(found - wanted).max() < 1e-4 * (wanted.max() - wanted.min())
    template = {"conversation": [{"role": "user", "content": "def f(x):\n    return 12"}], "tokenize": False}
    first, second = (AutoTokenizer.from_pretrained(where) for where in (base, target))
    assert first.apply_chat_template(**template) == second.apply_chat_template(**template)


@pytest.mark.parametrize("family", ["zephyr", "llama", "qwen2"])
@pytest.mark.parametrize("from_gguf", [False, True])
def test_a_chat_begins_as_it_did_in_training(
    family: str, from_gguf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zephyr's template leaves the BOS to the tokenizer, which adds none to what a template has made."""
    monkeypatch.setitem(TINY, family, TINY["llama"]._replace(tokenizer=family))
    base, target = write_folder(family, tmp_path / "base"), tmp_path / "target"
    if from_gguf:
        export_merged(base, None, tmp_path / "base.gguf", told)
        base = tmp_path / "base.gguf"
    export_folder(base, None, target, told)
    trained = render_prompt(load_tokenizer(read_base(base)), [Message(role="user", content="def f(x):")])
    served = AutoTokenizer.from_pretrained(target)
    chat = [{"role": "user", "content": "def f(x):"}]
    assert served.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == trained
    ids = served.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(served.bos_token_id) == (family != "qwen2")
    assert load_tokenizer(read_base(target)).chat_template == served.chat_template, "and it can be trained again"


@pytest.mark.parametrize("name", ["llama-llama3", "gemma2", "phi3-long"])
def test_of_a_gguf_the_merged_model_is_what_was_trained(name: str, tmp_path: Path) -> None:
    import peft

    export_merged(write_folder(name, tmp_path / "base"), None, tmp_path / "base.gguf", told)
    model = load_model(read_base(tmp_path / "base.gguf"), "float32", "cpu", longest=64)
    torch.manual_seed(2)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, options)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    export_folder(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "target", told)
    found, wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "target").float().eval()), logits(tuned.eval())
    assert np.abs(found - wanted).max() < 5e-3 * (wanted.max() - wanted.min()), "merged weights are rounded to F16"


def test_a_small_llama_gguf_gives_what_is_trained(tmp_path: Path) -> None:
    gguf = write_tiny_model(tmp_path / "tiny.gguf")
    export_folder(gguf, None, tmp_path / "target", told)
    trained = load_model(read_base(gguf), "float32", "cpu", longest=64).eval()
    assert np.allclose(logits(trained), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()), atol=1e-5)


@pytest.mark.parametrize(("factor", "original", "theta"), [(8.0, 64, 50_000.0), (8.0, 8192, 500_000.0), (32.0, 8192, 500_000.0)])
def test_scaled_positions_of_llama_3_are_told_back(factor: float, original: int, theta: float) -> None:
    scaling = {"factor": factor, "original_max_position_embeddings": original, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = {"rope_type": "llama3", "rope_theta": theta, **scaling}
    _, tensors = rope_of(parameters, 131_072, 64, ("llama3",))
    assert gguf_model._llama3(tensors["rope_freqs.weight"], theta, 131_072) == parameters


def test_positions_that_no_config_can_say_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_merged(write_folder("llama-llama3", tmp_path / "base"), None, tmp_path / "base.gguf", told)
    monkeypatch.setattr(gguf_model, "LLAMA3_BOUNDS", (1.5, 5.0))  # as if the divisors had been made with others
    with pytest.raises(JobFailed, match="no words for its scaled positions") as refused:
        export_folder(tmp_path / "base.gguf", None, tmp_path / "target", told)
    assert "folder" in refused.value.hint and not (tmp_path / "target").exists()


def test_a_config_that_names_no_class_and_no_kind_of_weights_is_told_them(tmp_path: Path) -> None:
    base, target = write_folder("qwen3", tmp_path / "base"), tmp_path / "target"
    config = json.loads((base / "config.json").read_bytes())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config | {"architectures": None}))
    export_folder(base, None, target, told)
    written = json.loads((target / "config.json").read_bytes())
    assert (written["architectures"], written["dtype"]) == (["Qwen3ForCausalLM"], "bfloat16")


def test_a_stop_leaves_the_earlier_folder(tmp_path: Path) -> None:
    base, target = write_folder("qwen2", tmp_path / "base"), tmp_path / "target"
    export_folder(base, None, target, told)

    def stop(done: int, total: int) -> None:
        raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        export_folder(base, None, target, stop)
    AutoModelForCausalLM.from_pretrained(target)
    assert not target.with_name("target.partial").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gpt_neox"}, "gpt_neox"),
        ("llama", {"model_type": "mixtral"}, "mixtral"),
        ("gemma3", {"model_type": "gemma3"}, "gemma3"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotary"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "windows"),
        ("gemma2", {"tie_word_embeddings": False}, "output"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "logits"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = write_folder(name, tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(JobFailed, match=message) as refused:
        architecture_of(base)
    assert refused.value.hint


def test_older_spellings_of_positions_are_read(tmp_path: Path) -> None:
    """rope_theta and rope_scaling, as transformers 4 wrote them."""
    base = write_folder("llama-llama3", tmp_path / "base")
    expected = architecture_of(base)
    config = json.loads((base / "config.json").read_bytes())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (base / "config.json").write_text(json.dumps(config))
    found = architecture_of(base)
    assert found.metadata == expected.metadata
    assert np.array_equal(found.tensors["rope_freqs.weight"], expected.tensors["rope_freqs.weight"])
    assert expected.tensors["rope_freqs.weight"].max() == 8.0 and expected.tensors["rope_freqs.weight"].min() == 1.0


def test_where_llama_cpp_has_no_window_the_context_ends_at_it(tmp_path: Path) -> None:
    metadata = architecture_of(write_folder("mistral-window", tmp_path / "base")).metadata
    assert metadata["{arch}.context_length"] == 128
