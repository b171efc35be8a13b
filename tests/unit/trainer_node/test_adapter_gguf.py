"""The GGUF adapter through llama.cpp computes what PEFT computes: the same log-probabilities, the same greedy tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import peft
import pytest
import torch
import xllamacpp
from safetensors.numpy import save_file

from config.errors import JobFailed
from tests.fakes.tiny_model import HEADS, HIDDEN, KV_HEADS, VOCABULARY, write_tiny_model
from trainer_node.export.adapter import export_adapter
from trainer_node.export.architectures import architecture_of
from trainer_node.export.lora import read_adapter
from trainer_node.export.weights import tensors_of
from trainer_node.train.base import BaseModel, load_model, load_tokenizer, read_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers so

PROMPT_IDS = [1, 99, 105, 740, 198, 50, 85, 278, 431, 721, 30, 2, 198]
GREEDY = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base(write_tiny_model(tmp_path_factory.mktemp("base") / "tiny.gguf"))


@pytest.fixture(scope="module")
def tuned(base: BaseModel) -> Any:
    """A model with a random adapter that changes every answer."""
    torch.manual_seed(1)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(load_model(base, "float32", "cpu", longest=64), options).eval()


@pytest.fixture(scope="module")
def adapter(tuned: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def served_logprobs(base: Path, adapter: Path | None) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and, for the first of them, every log-probability, from llama.cpp."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.port, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    body = {"prompt": PROMPT_IDS, "n_predict": GREEDY, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    reply = httpx.post(f"{server.listening_address}/completion", json={**body, "n_probs": VOCABULARY}, timeout=60).json()
    first = np.full(VOCABULARY, -np.inf)
    for entry in reply["completion_probabilities"][0]["top_logprobs"]:
        first[entry["id"]] = entry["logprob"]
    return list(reply["tokens"]), first


def trained_logprobs(model: Any) -> tuple[list[int], np.ndarray]:
    ids, first = list(PROMPT_IDS), None
    with torch.no_grad():
        for _ in range(GREEDY):
            logps = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            first = logps.numpy().copy() if first is None else first
            logps[2] = -torch.inf  # ignore_eos
            ids.append(int(logps.argmax()))
    assert first is not None
    return ids[len(PROMPT_IDS) :], first


def test_llama_cpp_computes_what_peft_computes(base: BaseModel, tuned: Any, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter.gguf"
    export_adapter(adapter, base.path, target)
    tokens, logprobs = trained_logprobs(tuned)
    served_tokens, served = served_logprobs(base.path, target)
    seen = np.isfinite(served)
    assert seen.sum() > VOCABULARY * 0.9
    assert np.abs(served - logprobs)[seen].max() < 0.01
    assert served_tokens == tokens


def test_the_base_without_the_adapter_is_another_model(base: BaseModel, tuned: Any) -> None:
    """Else the test above could pass on an adapter that does nothing."""
    with tuned.disable_adapter():
        tokens, logprobs = trained_logprobs(tuned)
    served_tokens, served = served_logprobs(base.path, None)
    seen = np.isfinite(served)
    assert np.abs(served - logprobs)[seen].max() < 0.01
    assert served_tokens == tokens
    assert tokens != trained_logprobs(tuned)[0]


def test_the_file_says_it_is_an_adapter(base: BaseModel, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter.gguf"
    export_adapter(adapter, base.path, target)
    reader = gguf.GGUFReader(target)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 12.0
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    assert len(shapes) == 2 * 7 * base.layers
    assert shapes["blk.1.attn_k.weight.lora_a"] == (HIDDEN, 4)
    assert shapes["blk.1.attn_k.weight.lora_b"] == (4, HIDDEN // HEADS * KV_HEADS)
    assert list(tmp_path.iterdir()) == [target]


def test_reordering_interleaves_the_halves_of_each_head(base: BaseModel) -> None:
    architecture = replace(architecture_of(base.path), head_dim=4)
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    assert architecture.interleave(rows)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert architecture.separate(architecture.interleave(rows)).tolist() == rows.tolist()


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{MODULE}.lora_A.weight": (4, HIDDEN), f"{MODULE}.lora_B.weight": (HIDDEN, 4)}
PLAIN = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "bias": "none"}


def scale_of(folder: Path, base: BaseModel, config: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> float:
    """Of the only module of an adapter with these tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    save_file({key: np.ones(shape, np.float32) for key, shape in shapes.items()}, folder / "adapter_model.safetensors")
    (low_rank,) = read_adapter(folder, tensors_of(base.path, architecture_of(base.path).names)).values()
    return low_rank.scale


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"k_proj": 1, "q_proj": 3, "proj": 5}}, 0.75),
        ({"alpha_pattern": {"proj": 1, r"layers\.0\.self_attn\..*": 6}, "use_rslora": True}, 3.0),
        ({"rank_pattern": {"q_proj": 4}, "r": 99}, 2.0),  # the stored rank counts
        (
            {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["lm_head"]},
            2.0,
        ),  # so do the stored modules
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, 2.0),
    ],
)
def test_the_scale_is_that_of_peft(base: BaseModel, tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    assert scale_of(tmp_path / "adapter", base, config, PAIR) == scale


@pytest.mark.parametrize(
    ("config", "shapes", "told"),
    [
        ({"use_dora": True}, PAIR, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, PAIR, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, PAIR, "pissa"),
        ({"init_lora_weights": "olora"}, PAIR, "olora"),
        ({"lora_bias": True}, PAIR, "lora_bias"),
        ({"bias": "all"}, PAIR, "bias"),
        ({"fan_in_fan_out": True}, PAIR, "fan_in_fan_out"),
        ({"trainable_token_indices": [1, 2]}, PAIR, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, PAIR, "target_parameters"),
        ({"layer_replication": [[0, 1], [0, 2]]}, PAIR, "layer_replication"),
        ({"use_qalora": True}, PAIR, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, PAIR, "use_bdlora"),
        ({"alora_invocation_tokens": [1]}, PAIR, "alora_invocation_tokens"),
        ({"corda_config": {"corda_method": "ipm"}}, PAIR, "corda_config"),
        ({"something_new": 1}, PAIR, "something_new"),
        ({"peft_type": "LOHA"}, PAIR, "LOHA"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, HIDDEN)}, "lora_embedding_A"),
        ({}, PAIR | {f"{MODULE}.lora_magnitude_vector": (1, HIDDEN)}, "lora_magnitude_vector"),
        ({}, {key.replace("model.layers.0.self_attn.q_proj", "lm_head"): PAIR[key] for key in PAIR}, "lm_head"),
        ({"alpha_pattern": {"q_proj": 3, ".*proj": 5}}, PAIR, "several of its alpha_pattern"),
        ({}, {}, "holds no matrices"),
        ({}, {f"base_model.model.language_model.{key}": PAIR[key] for key in PAIR}, "language_model"),
        ({}, {f"{MODULE}.lora_A.weight": (4, HIDDEN)}, "do not fit"),
        ({}, PAIR | {f"{MODULE}.lora_B.weight": (2 * HIDDEN, 4)}, "do not fit"),
    ],
)
def test_what_the_arithmetic_does_not_cover_is_refused_by_name(
    base: BaseModel, tmp_path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, int]], told: str
) -> None:
    with pytest.raises(JobFailed, match=told) as refused:
        scale_of(tmp_path / "adapter", base, config, shapes)
    assert refused.value.hint


def test_an_adapter_without_an_alpha_has_that_of_peft(base: BaseModel, tmp_path: Path) -> None:
    del (config := dict(PLAIN))["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: np.ones(shape, np.float32) for key, shape in PAIR.items()}, tmp_path / "adapter_model.safetensors")
    (low_rank,) = read_adapter(tmp_path, tensors_of(base.path, architecture_of(base.path).names)).values()
    assert low_rank.scale * 4 == peft.LoraConfig().lora_alpha


@pytest.mark.parametrize("text", ["", "[1]", "null", '"LORA"', "{"])
def test_an_adapter_config_that_is_none_is_refused(text: str, base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(JobFailed, match="no readable adapter_config.json"):
        read_adapter(tmp_path, {})


def test_an_adapter_is_no_base_to_train(base: BaseModel, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter.gguf"
    export_adapter(adapter, base.path, target)
    with pytest.raises(JobFailed, match="holds an adapter"):
        read_base(target)


def test_the_tokenizer_splits_digits_as_llama_cpp_does(base: BaseModel) -> None:
    tokenizer = load_tokenizer(base)
    ids = tokenizer("a  123", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["1", "2", "3"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "Sequence"
