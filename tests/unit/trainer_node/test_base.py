"""Bases of every family: read lightly, trained with the weights that are served, from a folder and from a GGUF alike."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from config.errors import ConfigError, JobCancelled, JobFailed
from tests.fakes.family_tokenizers import texts
from tests.fakes.tiny_folders import ROWS, TINY, write_folder
from tests.fakes.tiny_model import write_tiny_model
from trainer_node.base_model import base_sha256, model_name, resolve_base, served_gguf
from trainer_node.export.architectures import architecture_of
from trainer_node.export.weights import tensors_of
from trainer_node.train.base import BaseModel, load_model, load_tokenizer, read_base
from trainer_node.train.gguf_model import settings_of
from trainer_node.train.tokenizer import Rules

TOKENS = 60


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder("qwen2", tmp_path_factory.mktemp("base") / "Qwen-tiny")


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, ROWS, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return cast(torch.Tensor, model.eval()(input_ids=ids).logits[0])  # (T, vocabulary)


def converted(base: BaseModel, folder: Path) -> BaseModel:
    return read_base(served(base, folder))


def served(base: BaseModel, folder: Path, told: Callable[[int, int], None] = lambda done, total: None) -> Path:
    return served_gguf(base.path, base.sha256, folder, told)


@pytest.mark.parametrize("name", TINY)
def test_folder_and_gguf_are_the_same_model_with_the_same_words(name: str, tmp_path: Path) -> None:
    """F16 holds what bf16 does of these weights, so the two differ by rounding alone."""
    folder = read_base(write_folder(name, tmp_path / name))
    file = converted(folder, tmp_path / "cache")
    same = [(base.name, base.layers, base.hidden, base.feed_forward, base.context, base.vocabulary) for base in (folder, file)]
    assert same[0] == same[1] and folder.vocabulary == ROWS and file.linear != ()
    assert (folder.parameters, folder.lora_parameters(8)) == (file.parameters, file.lora_parameters(8))
    as_saved = logits(AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32))
    trained = [logits(load_model(base, "float32", "cpu", longest=TOKENS)) for base in (folder, file)]
    span = as_saved.max() - as_saved.min()
    assert all((each - as_saved).abs().max() < 1e-3 * span for each in trained)
    words = [load_tokenizer(base) for base in (folder, file)]
    written = texts(50, 3, ())
    assert words[0](written)["input_ids"] == words[1](written)["input_ids"]
    assert words[0].rules == words[1].rules and isinstance(words[0].rules, Rules)


def test_positions_stay_float32_whatever_the_weights_are(qwen: Path) -> None:
    model = load_model(read_base(qwen), "bfloat16", "cpu", longest=TOKENS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_folder_becomes_a_gguf_once(qwen: Path, tmp_path: Path) -> None:
    base, told = read_base(qwen), list[tuple[int, int]]()
    made = served(base, tmp_path / "cache", lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] and made.name == f"{base.sha256}.gguf"
    count = len(told)
    assert served(base, tmp_path / "cache", lambda done, total: told.append((done, total))) == made
    assert len(told) == count and served(read_base(made), tmp_path) == made

    def stop(done: int, total: int) -> None:
        raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        served(base, tmp_path / "other", stop)
    assert not list((tmp_path / "other").glob("*.gguf"))


def test_a_folder_is_named_by_what_its_model_computes(qwen: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(qwen, tmp_path / "copy"))
    (copy / "README.md").write_text("other")
    assert base_sha256(copy) == base_sha256(qwen) == read_base(qwen).sha256
    (copy / "chat_template.jinja").write_text("other")
    assert base_sha256(copy) != base_sha256(qwen)


def test_a_folder_of_the_hub_has_the_name_of_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--microsoft--Phi-3-mini" / "snapshots" / ("1f" * 20)
    write_folder("phi3", snapshot)
    assert model_name(snapshot) == read_base(snapshot).name == "Phi-3-mini"
    moved = snapshot.rename(tmp_path / "mine")
    assert model_name(moved) == "Phi-3 mine", "llama.cpp strips white space behind its tokens by that name"
    assert converted(read_base(moved), tmp_path / "cache").name == "Phi-3 mine"


def test_what_names_a_base(qwen: Path, tmp_path: Path) -> None:
    assert resolve_base(str(qwen)) == qwen
    file = write_tiny_model(tmp_path / "tiny.gguf")
    assert resolve_base(str(file)) == file
    for nothing in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ConfigError, match="neither a .gguf file"):
            resolve_base(str(nothing))


def test_a_folder_that_cannot_be_trained_is_refused_by_name(qwen: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(qwen, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(JobFailed, match="'mamba'"):
        read_base(copy)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("llama.rope.scaling.type", "longrope", "'longrope'"),
        ("llama.rope.dimension_count", 8, "rotates 8 of the 16"),
    ],
)
def test_a_gguf_that_transformers_would_compute_otherwise_is_refused(key: str, value: object, told: str, tmp_path: Path) -> None:
    source, path = write_tiny_model(tmp_path / "tiny.gguf"), tmp_path / "other.gguf"
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama")
    for name, found in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", key):
            kind, *inner = found.types
            writer.add_key_value(name, found.contents(), kind, inner[-1] if inner else None)
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)  # type: ignore[operator]
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    architecture = architecture_of(path)
    with pytest.raises(JobFailed, match=told):
        settings_of(path, architecture, tensors_of(path, architecture.names))


def test_what_has_been_converted_is_found_without_torch(qwen: Path, tmp_path: Path) -> None:
    made = served(read_base(qwen), tmp_path)
    code = """
import sys
from pathlib import Path
from trainer_node.base_model import base_sha256, served_gguf
from trainer_node.train.base import read_base
folder = Path(sys.argv[1])
read_base(served_gguf(folder, base_sha256(folder), Path(sys.argv[2]), print))
sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""
    assert made.is_file()
    subprocess.run([sys.executable, "-c", code, str(qwen), str(tmp_path)], check=True, cwd=Path(__file__).parents[3])
