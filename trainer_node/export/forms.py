"""The forms of a trained model: an adapter beside its base, one merged GGUF, a folder for transformers and vLLM.

Each is whole under its name or not there, and what is there is not made again. Merged ones of a folder are made one at a time:
they share what is between.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path

from config.contracts.job import ExportOptions
from config.errors import JobFailed
from config.locks import FileLock
from trainer_node.export.adapter import export_adapter
from trainer_node.export.merged import export_merged
from trainer_node.export.quantize import BITS, choose, quantize
from trainer_node.export.register import Exported
from trainer_node.export.weights import tensors_of
from trainer_node.export.writing import require_room

Say = Callable[[str, int, int], None]  # what is done now, bytes done and in all; what it raises ends it
PLAIN, USUAL = "F16", "Q8_0"
LOCK = ".gguf.lock"  # hidden: nobody pulls it


def wanted_form(asked: ExportOptions, base: Path) -> tuple[str, str]:
    """The route and the kind of weights that a job registers; of an adapter none.

    Left to us, a base that is a GGUF is served as it is, the adapter beside it: nothing is lost, and it takes seconds.
    Safetensors have to be written as a GGUF in any case: then one of both, in what loses little and every machine can make.
    """
    if asked.route == "adapter" or (asked.route == "auto" and base.is_file() and not asked.quantize):
        return "adapter", ""
    return "merged", asked.quantize or (PLAIN if asked.route == "merged" else USUAL)


def make_form(route: str, kind: str, *, base: Path, adapter: Path, folder: Path, say: Say) -> Exported:
    """Make a form below `folder`: adapter.gguf, gguf/<KIND>.gguf or merged/.

    Args:
        route: adapter, merged or hf.
        kind: of a merged GGUF's weights; empty is F16.
        base: the GGUF file or the Hugging Face folder that was trained.
        adapter: the PEFT folder.

    Raises:
        JobFailed: what cannot be expressed in that form, or another process makes a merged GGUF there.
        DiskFull, StoreError: it cannot be written.
    """
    if route == "adapter":
        if not (folder / "adapter.gguf").exists():
            export_adapter(adapter, base, folder / "adapter.gguf")
        return Exported(route=route, file="adapter.gguf")
    if route == "hf":
        from trainer_node.export.folder import export_folder

        if not (folder / "merged").exists():
            export_folder(base, adapter, folder / "merged", lambda done, total: say("merging", done, total))
        return Exported(route=route, file="merged")
    lock = FileLock(folder / LOCK)
    if not lock.acquire():
        raise JobFailed(f"{folder}: another GGUF is being made there", hint="try again when that one is done")
    try:
        return _merged(kind or PLAIN, base, adapter, folder / "gguf", say)
    finally:
        lock.release()


def _merged(kind: str, base: Path, adapter: Path, folder: Path, say: Say) -> Exported:
    plain = folder / f"{PLAIN}.gguf"

    def merge(target: Path) -> None:
        export_merged(base, adapter, target, lambda done, total: say("merging", done, total))

    if kind == PLAIN:
        if not plain.exists():
            merge(plain)
        return Exported(route="merged", file=f"gguf/{plain.name}", quantized=PLAIN)
    choice = choose(kind)
    target = folder / f"{choice.makes}.gguf"
    exported = Exported(
        route="merged", file=f"gguf/{target.name}", quantized=choice.makes, quantizer=choice.name, note=choice.note
    )
    if target.exists():
        return exported
    between = plain if plain.exists() else folder / f".{PLAIN}.gguf"  # hidden: nobody pulls it
    folder.mkdir(parents=True, exist_ok=True)
    values = sum(prod(tensor.shape) for tensor in tensors_of(base).values())
    bits = BITS[choice.makes] + (0 if between.exists() else BITS[PLAIN])
    require_room(target, int(values * bits / 8))
    if not between.exists():
        merge(between)
    try:
        quantize(between, target, kind, lambda done, total: say(f"quantizing to {choice.makes}", done, total), choice)
    finally:
        if between != plain:
            between.unlink(missing_ok=True)
    return exported
