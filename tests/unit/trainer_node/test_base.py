"""Bases of every family: read lightly, trained with the weights that are served, from a folder and from a GGUF alike."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from config.errors import ConfigError, JobCancelled, JobFailed
from config.locks import FileLock
from tests.fakes.family_tokenizers import texts
from tests.fakes.tiny_folders import LONG_FROM, ROWS, TINY, write_folder
from tests.fakes.tiny_model import write_tiny_model
from trainer_node import base_model
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


def test_a_base_with_two_sets_of_positions_is_read_as_far_as_the_short_ones(tmp_path: Path) -> None:
    """With a longer context llama.cpp rotates all of a text by the long ones, transformers only a long text."""
    folder = read_base(write_folder("phi3-long", tmp_path / "phi"))
    assert TINY["phi3-long"].config["max_position_embeddings"] > LONG_FROM
    assert (folder.context, converted(folder, tmp_path / "cache").context) == (LONG_FROM, LONG_FROM)


def test_yarn_with_a_range_that_llama_cpp_does_not_read_is_refused_in_a_gguf(tmp_path: Path) -> None:
    file = converted(read_base(write_folder("llama-yarn", tmp_path / "yarn")), tmp_path / "cache").path
    architecture = architecture_of(file)
    tensors = tensors_of(file, architecture.names)
    assert settings_of(file, architecture, tensors)["rope_parameters"]["beta_fast"] == 32
    data = bytearray(file.read_bytes())
    place = data.index(b"llama.rope.scaling.yarn_beta_fast") + len("llama.rope.scaling.yarn_beta_fast") + 4
    data[place : place + 4] = struct.pack("<f", 16.0)
    file.write_bytes(data)
    with pytest.raises(JobFailed, match="YaRN with .*16"):
        settings_of(file, architecture, tensors)


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


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read to be hashed; all of them count as large, and as old enough to be remembered."""
    found: list[Path] = []
    hashing = base_model._hashed

    def seen(path: Path) -> str:
        found.append(path)
        return hashing(path)

    monkeypatch.setattr(base_model, "_hashed", seen)
    monkeypatch.setattr(base_model, "LARGE_BYTES", 0)
    monkeypatch.setattr(base_model, "SETTLED_NS", 0)
    return found


def test_a_large_file_is_hashed_once(qwen: Path, hashed: list[Path]) -> None:
    first = base_sha256(qwen)
    count = len(hashed)
    assert count > 2 and base_sha256(qwen) == first and len(hashed) == count


def overwritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"#")


def with_its_times_set_back(path: Path) -> None:
    before = path.stat()
    overwritten(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_in_its_place(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    with_its_times_set_back(other)
    os.replace(other, path)


@pytest.mark.parametrize("touch", [overwritten, with_its_times_set_back, another_in_its_place])
def test_a_file_that_was_touched_is_hashed_again(touch: Callable[[Path], None], hashed: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF" + bytes(1000))
    before = base_sha256(file)
    touch(file)
    assert base_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest() != before


def test_a_file_that_was_changed_just_now_is_not_remembered(
    hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock may be too coarse to show the next change."""
    monkeypatch.setattr(base_model, "SETTLED_NS", 10**15)
    file = tmp_path / "base.gguf"
    file.write_bytes(bytes(1000))
    assert base_sha256(file) == base_sha256(file) and len(hashed) == 2


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b'{"seen": 1, "sha256": "x"}', b'{"seen": null}'])
def test_a_note_of_a_hash_that_says_nothing_is_made_anew(note: bytes, hashed: list[Path], tmp_path: Path, home: Path) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(bytes(1000))
    before = base_sha256(file)
    notes = list((home / "node" / "cache" / "hashes").iterdir())
    assert len(notes) == 1
    notes[0].write_bytes(note)
    assert base_sha256(file) == before and len(hashed) == 2
    assert base_sha256(file) == before and len(hashed) == 2


def test_a_folder_that_another_job_converts_is_waited_for(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as it takes; a stop ends the waiting."""
    monkeypatch.setattr(base_model, "LISTEN_S", 0.01)
    base, cache = read_base(qwen), tmp_path / "cache"
    other = FileLock(cache / f"{base.sha256}.lock")
    assert other.acquire()

    def stop(done: int, total: int) -> None:
        raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        served(base, cache, stop)
    asked = 0

    def told(done: int, total: int) -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            other.release()

    assert served(base, cache, told).is_file() and asked > 3


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
    with pytest.raises(ConfigError, match="no-such-user"):
        resolve_base("~no-such-user/base.gguf")


def test_a_folder_that_cannot_be_trained_is_refused_by_name(qwen: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(qwen, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(JobFailed, match="'mamba'"):
        read_base(copy)


def rewritten(path: Path, key: str, value: object, *, without: str = "") -> Path:
    """A tiny GGUF with another value under a key, or without a tensor."""
    source = write_tiny_model(path.with_name("source.gguf"))
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama")
    for name, found in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", key):
            kind, *inner = found.types
            writer.add_key_value(name, found.contents(), kind, inner[-1] if inner else None)
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)  # type: ignore[operator]
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("llama.rope.scaling.type", "longrope", "'longrope'"),
        ("llama.rope.dimension_count", 8, "rotates 8 of the 16"),
    ],
)
def test_a_gguf_that_transformers_would_compute_otherwise_is_refused(key: str, value: object, told: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "other.gguf", key, value)
    architecture = architecture_of(path)
    with pytest.raises(JobFailed, match=told):
        settings_of(path, architecture, tensors_of(path, architecture.names))


@pytest.mark.parametrize(
    ("key", "value", "without", "told"),
    [
        ("split.count", 3, "", "one of several parts"),
        ("llama.expert_count", 8, "", "mixture of experts"),
        ("general.type", "adapter", "", "holds an adapter"),
        ("general.name", "words", "token_embd.weight", "no embedding"),
    ],
)
def test_a_gguf_that_cannot_be_trained_is_refused_when_it_is_read(
    key: str, value: object, without: str, told: str, tmp_path: Path
) -> None:
    """So the plan of a job refuses it, before a GPU is waited for."""
    with pytest.raises(JobFailed, match=told) as refused:
        read_base(rewritten(tmp_path / "other.gguf", key, value, without=without))
    assert refused.value.hint


def test_weights_that_transformers_would_draw_at_random_are_refused(qwen: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(qwen, tmp_path / "copy"))
    base = read_base(copy)
    name = "model.layers.0.self_attn.q_proj.bias"
    index = json.loads((copy / "model.safetensors.index.json").read_bytes())
    shard = copy / index["weight_map"].pop(name)
    kept = {key: values for key, values in load_file(shard).items() if key != name}
    save_file(kept, shard, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(JobFailed, match=name):
        load_model(base, "float32", "cpu", longest=TOKENS)


def test_a_gguf_is_loaded_in_the_kind_of_weights_that_is_trained(tmp_path: Path) -> None:
    base = read_base(write_tiny_model(tmp_path / "tiny.gguf"))
    exact, rounded = (load_model(base, dtype, "cpu", longest=TOKENS) for dtype in ("float32", "bfloat16"))
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert other.dtype == torch.bfloat16 and torch.equal(one.bfloat16(), other)
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight, "tied: one tensor"
    assert not any(values.is_meta for values in [*rounded.parameters(), *rounded.buffers()])


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
