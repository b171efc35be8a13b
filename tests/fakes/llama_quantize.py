"""A llama-quantize that keeps to what the real one (llama.cpp b11434) does with arguments, words, files and exit codes.

    program = write_llama_quantize(folder, "cut")

Its weights stay as they are: only the header says the kind that was asked for. `how` is what goes wrong (`HOW`); "" is nothing.
"""

import os
import re
import sys
import time
from pathlib import Path

import gguf

NAME = "llama-quantize"
HOW = ("", "refuses", "full", "nothing", "cut", "junk", "other kind", "fewer tensors", "talks on", "aborts")
SCRIPT = """#!{python}
import sys
sys.path.insert(0, {root!r})
from tests.fakes.llama_quantize import main
sys.exit(main(sys.argv[1:], {how!r}))
"""


def write_llama_quantize(folder: Path, how: str = "") -> Path:
    assert how in HOW
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    path.write_text(SCRIPT.format(python=sys.executable, root=str(Path(__file__).parents[2]), how=how))
    path.chmod(0o755)
    return path


def main(args: list[str], how: str) -> int:
    if len(args) < 2 or args[0].startswith("-"):
        return say(f"usage: {NAME} [--help] [--allow-requantize] … model-f32.gguf [model-quant.gguf] type [nthreads]")
    source, target, *rest = args
    kind = kind_of(target)  # the second word is a kind where it can be read as one
    if kind is not None:
        target = str(Path(source).parent / f"ggml-model-{kind}.gguf")
    elif not rest:
        return say("llama_quantize: missing ftype")
    elif (kind := kind_of(rest.pop(0))) is None:
        return say(f"llama_quantize: invalid ftype '{args[2]}'")
    if rest and not re.match(r"[+-]?\d", rest[0]):
        return say(f"llama_quantize: invalid nthread '{rest[0]}' (stoi)")
    say(f"llama_quantize: quantizing '{source}' to '{target}' as {kind}")
    say("llama_model_loader: - kv   3:   general.name str   = [1/0] a name that looks like progress")
    return quantize(Path(source), Path(target), kind, how)


def kind_of(word: str) -> str | None:
    """By name, or by the number that it begins with, as C's stoi reads it."""
    names = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind.value for kind in gguf.LlamaFileType}
    number = re.match(r"\s*([+-]?\d+)", word)
    found = (name for name, value in names.items() if name == word.upper() or (number and int(number[1]) == value))
    return next(found, None)


def quantize(source: Path, target: Path, kind: str, how: str) -> int:
    if how == "refuses":
        return fail(source, "unknown model architecture: 'odd'")
    if how != "nothing":
        write(source, target, "Q2_K" if how == "other kind" else kind, dropped=how == "fewer tensors")
    count = 4
    for part in range(1, count + 1):
        say(f"[{part:4}/{count:4}] blk.{part}.attn_q.weight - [64, 64, 1, 1], type = f16, converting to {kind} .. size = 1 MiB")
    if how == "talks on":
        while True:
            time.sleep(0.02)
            say(f"[{count:4}/{count:4}] output.weight")
    if how in ("cut", "full"):
        target.write_bytes(target.read_bytes()[:-100])
    if how == "junk":
        target.write_bytes(bytes(1000))
    if how == "aborts":
        os.abort()
    return fail(source, "basic_ios::clear: iostream error") if how == "full" else 0


def fail(source: Path, why: str) -> int:
    say(f"llama_model_quantize: failed to quantize: {why}")
    return say(f"llama_quantize: failed to quantize model from '{source}'")


def say(line: str) -> int:
    """Returns the exit code of what it mostly says."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
    return 1


def write(source: Path, target: Path, kind: str, *, dropped: bool) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors[1 if dropped else 0 :]:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
