"""The forms of a trained model: an adapter beside its base, one merged GGUF, a folder for transformers and vLLM.

Each is whole under its name or not there, and what is there is not made again.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path

from trainer_node.export.adapter import export_adapter
from trainer_node.export.merged import export_merged
from trainer_node.export.quantize import BITS, choose, quantize
from trainer_node.export.register import Exported
from trainer_node.export.weights import tensors_of
from trainer_node.export.writing import require_room

Say = Callable[[str, int, int], None]  # what is done now, bytes done and in all; what it raises ends it
PLAIN = "F16"


def make_form(route: str, kind: str, *, base: Path, adapter: Path, folder: Path, say: Say) -> Exported:
    """Make a form below `folder`: adapter.gguf, gguf/<KIND>.gguf or merged/.

    Args:
        route: adapter, merged or hf.
        kind: of a merged GGUF's weights; empty is F16.
        base: the GGUF file or the Hugging Face folder that was trained.
        adapter: the PEFT folder.

    Raises:
        JobFailed: what cannot be expressed in that form.
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
    return _merged(kind or PLAIN, base, adapter, folder / "gguf", say)


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
        quantize(between, target, kind, lambda done, total: say(f"quantizing to {choice.makes}", done, total))
    finally:
        if between != plain:
            between.unlink(missing_ok=True)
    return exported
