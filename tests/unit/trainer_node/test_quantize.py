"""The chain of quantizers: the first that is there, what stands in for what, and what the pure one writes."""

import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from config.errors import JobFailed
from tests.fakes.tiny_model import write_tiny_model
from trainer_node.export import quantize as quantizing
from trainer_node.export.quantize import choose, quantize

FAKE = """#!{python}
import sys, time
source, target, kind = sys.argv[1:4]
for part in (1, 2):
    print(f"[   {{part}}/   2]  blk.0.attn_q.weight - converting to {{kind}}", flush=True)
{end}
"""
MAKES = 'open(target, "wb").write(kind.encode() + open(source, "rb").read()[:4])'


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any quantizer; the folder is its PATH."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(quantizing, "_of_ollama", lambda: iter(()))
    monkeypatch.setattr(quantizing, "BINDING", "no_such_package")
    return path


def program(folder: Path, end: str = MAKES) -> Path:
    path = folder / quantizing.PROGRAM
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.format(python=sys.executable, end=end))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "f32.gguf")


def unheard(done: int, total: int) -> None:
    """Progress that nobody listens to."""


posix = pytest.mark.skipif(os.name != "posix", reason="the fake program is a script")


@posix
def test_the_program_of_ollama_comes_before_that_of_the_path(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare)
    assert choose("Q4_K_M").program == bare / quantizing.PROGRAM
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(bare))
    own = program(tmp_path / "lib" / "ollama")
    (bare / "ollama").write_text("#!/bin/sh\n")
    (bare / "ollama").chmod(0o755)
    assert choose("Q4_K_M").program == own


@posix
def test_a_program_is_run_and_its_progress_told(bare: Path, tmp_path: Path) -> None:
    program(bare)
    source, target, told = tmp_path / "f16.gguf", tmp_path / "q.gguf", []
    source.write_bytes(b"GGUF" + bytes(96))
    name = quantize(source, target, "Q4_K_M", lambda done, total: told.append((done, total)))
    assert name == f"llama-quantize ({bare / quantizing.PROGRAM})"
    assert target.read_bytes() == b"Q4_K_MGGUF"
    assert told == [(50, 100), (100, 100), (100, 100)]


@posix
@pytest.mark.parametrize("end", ["sys.exit(3)", "pass", f"{MAKES}; sys.exit(1)"])
def test_a_program_that_fails_leaves_nothing(bare: Path, tmp_path: Path, end: str) -> None:
    program(bare, end)
    source = tmp_path / "f16.gguf"
    source.write_bytes(b"GGUF")
    with pytest.raises(JobFailed, match="made no Q8_0"):
        quantize(source, tmp_path / "q.gguf", "Q8_0", unheard)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["f16.gguf"]


@posix
def test_who_listens_can_stop_it(bare: Path, tmp_path: Path) -> None:
    program(bare, "time.sleep(60)")
    source = tmp_path / "f16.gguf"
    source.write_bytes(b"GGUF")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "q.gguf", "Q8_0", stop)
    assert not (tmp_path / "q.gguf").exists()


def test_the_python_binding_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_llama.py").write_text(
        "LLAMA_FTYPE_MOSTLY_Q4_K_M = 15\n"
        "class Options: ftype = 0\n"
        "def llama_model_quantize_default_params(): return Options()\n"
        "def llama_model_quantize(source, target, options):\n"
        "    with open(target, 'wb') as file: file.write(str(options.ftype).encode())\n"
        "    return 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(quantizing, "BINDING", "fake_llama")
    (tmp_path / "f16.gguf").write_bytes(b"GGUF")
    assert quantize(tmp_path / "f16.gguf", tmp_path / "q.gguf", "Q4_K_M", unheard) == "llama-cpp-python"
    assert (tmp_path / "q.gguf").read_bytes() == b"15"


@pytest.mark.parametrize(
    ("asked", "made"),
    [("Q8_0", "Q8_0"), ("Q5_1", "Q5_1"), ("Q4_0", "Q4_0"), ("Q4_K_M", "Q4_0"), ("Q5_K_M", "Q5_1"), ("Q6_K", "Q8_0")],
)
def test_what_stands_in_is_said(asked: str, made: str) -> None:
    choice = choose(asked)
    assert (choice.makes, choice.name.split()[0]) == (made, "gguf")
    assert (asked in choice.note and made in choice.note) if asked != made else choice.note == ""


@pytest.mark.parametrize(("kind", "type_", "error"), [("Q8_0", "Q8_0", 0.01), ("Q5_1", "Q5_1", 0.06), ("Q4_K_M", "Q4_0", 0.13)])
def test_the_pure_one_keeps_all_but_the_bits(tiny: Path, tmp_path: Path, kind: str, type_: str, error: float) -> None:
    """Every key and tensor is there; vectors stay as they are, matrices are near what they were, the embedding nearest."""
    source = tiny
    told: list[tuple[int, int]] = []
    quantize(source, tmp_path / "q.gguf", kind, lambda done, total: told.append((done, total)))
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "q.gguf")
    assert [each.name for each in after.tensors] == [each.name for each in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert list(old.shape) == list(new.shape)
        want = "F32" if len(old.shape) == 1 else "Q8_0" if old.name == "token_embd.weight" else type_
        assert new.tensor_type.name == want, new.name
        values, rounded = dequantize(old.data, old.tensor_type), dequantize(new.data, new.tensor_type)
        assert np.linalg.norm(values - rounded) <= error * np.linalg.norm(values), new.name
    own = {"general.file_type", "general.quantization_version"}
    kept = {name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")}
    found = {name: field.contents() for name, field in after.fields.items() if not name.startswith("GGUF.")}
    assert {name: value for name, value in found.items() if name not in own} == {
        name: value for name, value in kept.items() if name not in own
    }
    assert found["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{type_}"]
    assert told[-1][0] == told[-1][1] and [each[0] for each in told[:-1]] == sorted(each[0] for each in told[:-1])
    assert (tmp_path / "q.gguf").stat().st_size < source.stat().st_size / 2
