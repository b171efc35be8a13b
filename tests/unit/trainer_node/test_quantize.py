"""The chain of quantizers: the first that is there, what stands in for what, and what the pure one writes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from config.contracts.job import Quantization
from config.errors import DiskFull, JobCancelled, JobFailed
from tests.fakes.llama_quantize import write_llama_quantize
from tests.fakes.tiny_model import write_tiny_model
from tests.fakes.waiting import wait_for
from trainer_node.export import quantize as quantizing
from trainer_node.export import writing
from trainer_node.export.quantize import choose, quantize
from trainer_node.runtime.gguf_file import read_gguf

BINDING = """
import ctypes, os, shutil, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.fakes import llama_quantize

LLAMA_FTYPE_MOSTLY_Q4_K_M = 15
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
class Options: ftype = 0
def llama_log_set(callback, data):
    assert isinstance(callback, llama_log_callback) and not callback
def llama_model_quantize_default_params():
    return Options()
def llama_model_quantize(source, target, options):
    kinds = {{15: "Q4_K_M"}}
    return llama_quantize.quantize(Path(os.fsdecode(source)), Path(os.fsdecode(target)), kinds[options.ftype], {how!r})
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any quantizer; the folder is its PATH."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(quantizing, "_of_ollama", lambda: iter(()))
    monkeypatch.setattr(quantizing, "BINDING", "no_such_package")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "f32.gguf")


def unheard(done: int, total: int) -> None:
    """Progress that nobody listens to."""


def binding(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str = "") -> None:
    root = str(Path(__file__).parents[3])
    (folder / "fake_llama.py").write_text(BINDING.format(root=root, how=how))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(quantizing, "BINDING", "fake_llama")


posix = pytest.mark.skipif(os.name != "posix", reason="the fake program is a script")


def test_every_kind_that_can_be_asked_for_is_made_by_someone() -> None:
    asked = set(get_args(Quantization)) - {"F16"}
    assert asked == {*quantizing.MADE_IN_PYTHON, *quantizing.STANDS_IN}
    assert asked < set(quantizing.BITS) and set(quantizing.STANDS_IN.values()) <= set(quantizing.MADE_IN_PYTHON)


def test_a_kind_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(JobFailed, match="'Q9_X'") as refused:
        choose("Q9_X")
    assert all(kind in refused.value.hint for kind in get_args(Quantization) if kind != "F16")


@posix
@pytest.mark.parametrize("place", ["lib/ollama", "bin/lib/ollama", "bin"])  # of Linux, Windows, macOS
def test_the_program_of_ollama_comes_before_that_of_the_path(
    place: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = write_llama_quantize(bare)
    assert choose("Q4_K_M").command == (str(on_path),)
    monkeypatch.undo()
    installed = tmp_path / "Ollama"
    own = write_llama_quantize(installed / place)
    (installed / "bin").mkdir(exist_ok=True)
    (installed / "bin" / "ollama").write_text("#!/bin/sh\n")
    (installed / "bin" / "ollama").chmod(0o755)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "ollama").symlink_to(installed / "bin" / "ollama")
    monkeypatch.setenv("PATH", f"{tmp_path / 'links'}{os.pathsep}{bare}")
    assert choose("Q4_K_M").command == (str(own),)
    own.unlink()
    own.mkdir()
    assert choose("Q4_K_M").command == (str(on_path),), "a folder of that name is no program"


@posix
def test_a_program_is_run_and_its_progress_told(bare: Path, tiny: Path, tmp_path: Path) -> None:
    program, told = write_llama_quantize(bare), list[tuple[int, int]]()
    name = quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", lambda done, total: told.append((done, total)))
    assert name == f"llama-quantize ({program})"
    assert read_gguf(tmp_path / "q.gguf").file_type == "Q4_K_M"
    size = tiny.stat().st_size
    assert told == [(int(size * share), size) for share in (0.25, 0.5, 0.75, 1, 1)]


@posix
@pytest.mark.parametrize("folder", ["7", "-7", "Q8_0", "a b"])
def test_a_target_is_never_read_as_a_kind_or_an_option(
    folder: str, bare: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama_quantize(bare)
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    quantize(tiny, Path(folder) / "q.gguf", "Q4_K_M", unheard)
    assert [path.name for path in Path(folder).iterdir()] == ["q.gguf"] and read_gguf(Path(folder) / "q.gguf").tensors


@posix
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("refuses", "unknown model architecture"),
        ("aborts", "was killed by SIGABRT"),
        ("nothing", "left no whole GGUF"),
        ("cut", "left no whole GGUF"),
        ("junk", "left no whole GGUF"),
        ("other kind", "Q2_K instead of Q4_K_M"),
        ("fewer tensors", "or other tensors"),
    ],
)
@pytest.mark.parametrize("bound", [False, True])
def test_what_fails_or_is_not_whole_is_no_file(
    how: str, told: str, bound: bool, bare: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it says of its end; the library ends nobody but itself."""
    if bound:
        binding(tmp_path, monkeypatch, how)
    else:
        write_llama_quantize(bare, how)
    with pytest.raises(JobFailed, match=told) as failed:
        quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", unheard)
    assert "llama" in str(failed.value) and "current llama.cpp" in failed.value.hint
    assert not list(tmp_path.glob("q.gguf*"))


@posix
def test_a_disk_that_fills_up_meanwhile_is_a_full_disk(
    bare: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp knows only of an I/O error, and the job of a full disk goes on by itself once there is room."""
    write_llama_quantize(bare, "full")
    usage = writing.shutil.disk_usage(tmp_path)
    free = iter([10**12, 4096])
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    with pytest.raises(DiskFull, match="GB are free"):
        quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", unheard)
    assert not list(tmp_path.glob("q.gguf*"))


@posix
@pytest.mark.parametrize("text", ["", "\x7fELF of another machine"])
def test_a_program_that_cannot_be_started_is_named(text: str, bare: Path, tiny: Path, tmp_path: Path) -> None:
    program = write_llama_quantize(bare)
    program.write_text(text)
    with pytest.raises(JobFailed, match="cannot be started") as failed:
        quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", unheard)
    assert str(program) in str(failed.value) and not (tmp_path / "q.gguf").exists()


@posix
@pytest.mark.parametrize("bound", [False, True])
def test_who_listens_can_stop_it(bound: bool, bare: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if bound:
        binding(tmp_path, monkeypatch, "talks on")
    else:
        write_llama_quantize(bare, "talks on")

    def stop(done: int, total: int) -> None:
        raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", stop)
    assert not list(tmp_path.glob("q.gguf*"))


QUANTIZE = """
import sys
from pathlib import Path
from trainer_node.export import quantize as quantizing
quantizing._of_ollama = lambda: iter(())
quantizing.BINDING = sys.argv[3]
quantizing.quantize(Path(sys.argv[1]), Path(sys.argv[2]), "Q4_K_M", lambda done, total: print(done, flush=True))
"""


@posix
@pytest.mark.parametrize("bound", [False, True])
def test_kill_9_takes_the_quantizer_along(
    bound: bool, bare: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt writes the same file: two must not."""
    import psutil

    if bound:
        binding(tmp_path, monkeypatch, "talks on")
    else:
        write_llama_quantize(bare, "talks on")
    argv = [sys.executable, "-c", QUANTIZE, str(tiny), str(tmp_path / "q.gguf"), quantizing.BINDING]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline().strip().isdigit()
        quantizers = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert quantizers
    wait_for("the end of the quantizer", lambda: not any(map(_runs, quantizers)))


def _runs(process: Any) -> bool:
    import psutil

    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


@posix
def test_the_python_binding_comes_next(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binding(tmp_path, monkeypatch)
    told: list[int] = []
    assert quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", lambda done, total: told.append(done)) == "llama-cpp-python"
    assert read_gguf(tmp_path / "q.gguf").file_type == "Q4_K_M"
    assert len(told) == 5 and told == sorted(told), "it is heard, too"


@posix
def test_a_quantizer_that_comes_meanwhile_makes_nothing_under_the_name_of_another_kind(
    bare: Path, tiny: Path, tmp_path: Path
) -> None:
    choice = choose("Q4_K_M")
    write_llama_quantize(bare)
    assert quantize(tiny, tmp_path / "Q4_0.gguf", "Q4_K_M", unheard, choice).startswith("gguf ")
    assert read_gguf(tmp_path / "Q4_0.gguf").file_type == "Q4_0"


def test_what_stops_the_pure_one_leaves_nothing_open(tiny: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        quantize(tiny, tmp_path / "q.gguf", "Q8_0", stop)
    assert not list(tmp_path.glob("q.gguf*"))
    if sys.platform == "linux":
        opened = [os.readlink(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd") if _is_open(handle)]
        assert not [path for path in opened if "q.gguf" in path], "Windows removes no file that is open"


def _is_open(handle: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{handle}")


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
