"""The GGUF adapter through llama.cpp computes what PEFT computes: the same log-probabilities, the same greedy tokens."""

import json
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import peft
import pytest
import torch
import xllamacpp

from config.errors import JobFailed
from tests.fakes.tiny_model import HEADS, HIDDEN, KV_HEADS, VOCABULARY, write_tiny_model
from trainer_node.export.adapter import export_adapter, gguf_tensors, reorder_rows, scaled_alpha
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
    export_adapter(adapter, base, target)
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
    export_adapter(adapter, base, target)
    reader = gguf.GGUFReader(target)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 12.0
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    assert len(shapes) == 2 * 7 * base.layers
    assert shapes["blk.1.attn_k.weight.lora_a"] == (HIDDEN, 4)
    assert shapes["blk.1.attn_k.weight.lora_b"] == (4, HIDDEN // HEADS * KV_HEADS)
    assert list(tmp_path.iterdir()) == [target]


def test_reordering_interleaves_the_halves_of_each_head() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    assert reorder_rows(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rslora_is_expressed_in_alpha() -> None:
    assert scaled_alpha({"lora_alpha": 32, "r": 16}) == 32
    assert scaled_alpha({"lora_alpha": 32, "r": 16, "use_rslora": True}) == 128  # 128/16 == 32/sqrt(16)


@pytest.mark.parametrize(
    ("config", "tensor"),
    [
        ({"use_dora": True}, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ({}, "base_model.model.model.embed_tokens.lora_embedding_A"),
        ({}, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({}, "base_model.model.lm_head.lora_A.weight"),
    ],
)
def test_what_the_arithmetic_does_not_cover_is_refused(base: BaseModel, config: dict[str, Any], tensor: str) -> None:
    with pytest.raises(JobFailed):
        gguf_tensors({tensor: np.zeros((4, HIDDEN), np.float32)}, {"lora_alpha": 8, "r": 4, **config}, base)


def test_an_adapter_is_no_base_to_train(base: BaseModel, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter.gguf"
    export_adapter(adapter, base, target)
    with pytest.raises(JobFailed, match="holds an adapter"):
        read_base(target)


def test_the_tokenizer_splits_digits_as_llama_cpp_does(base: BaseModel) -> None:
    tokenizer = load_tokenizer(base)
    ids = tokenizer("a  123", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["1", "2", "3"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "Sequence"
