"""Registration: version first, gate, then the aliases. A tag that hafs did not make is never moved.

Run again for the same job it registers the same version, from the same files.
"""

import logging
import os
import shutil
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from config.contracts.base import Tolerant
from config.contracts.job import JobResult, JobSpec
from config.errors import GateFailed, ProviderUnavailable, translate_os_errors
from config.files import replace, sync_folder, write_atomic
from trainer_node import registry
from trainer_node.aliases import promote
from trainer_node.base_model import base_tag
from trainer_node.export.gate import require_gate
from trainer_node.export.modelfile import Dress, modelfile
from trainer_node.export.probes import Probes
from trainer_node.jobdir import JobDir
from trainer_node.ollama import OllamaApi, Progress
from trainer_node.registry import ModelRecord

log = logging.getLogger("hafs")
KEPT = (
    "adapter",
    "adapter.gguf",
    "gguf",
    "job.json",
    "metrics.jsonl",
    "training_stats.json",
    "evaluation.json",
    "probes.json",
    "export.json",
)
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<eos>", "</s>")
MIN_CONTEXT = 2048
DRESS = "dress.json"


class Exported(Tolerant):
    """export.json: what is to be served. `file` is named below the job's folder; `note` says what is not as it was asked for."""

    route: str
    file: str
    quantized: str = ""
    quantizer: str = ""
    note: str = ""

    @property
    def exact(self) -> bool:
        """The weights are those that were trained, but for rounding to 16 bits."""
        return self.route == "adapter" or self.quantized == "F16"

    @property
    def modelfile(self) -> str:
        """Where the Modelfile stands: beside the GGUF."""
        path = Path(self.file)
        return "Modelfile" if self.route == "adapter" else path.with_name(f"{path.stem}.Modelfile").as_posix()


def register(
    api: OllamaApi,
    draft: ModelRecord,
    exported: Exported,
    base: Path,
    context: int,
    spec: JobSpec,
    job_dir: JobDir,
    probes: Probes,
    told: Progress = lambda sent, total: None,
) -> ModelRecord:
    """Create the next version at the server, pass the gate, record it.

    Args:
        base: the GGUF of the base, for an adapter.
        context: tokens that the base can take.
        told: told bytes sent and bytes in all of what is uploaded; what it raises ends it.

    Raises:
        GateFailed: the version stays at the server and in the registry for inspection, but does not count.
        ProviderUnavailable: also where somebody else has made a model of its name meanwhile; the next attempt takes another.
    """
    assert draft.perplexity is not None
    root, tags = job_dir.root, api.tags()
    record = registry.reserve(root, draft, tags)
    if record.passed and tags.get(record.tag) == record.digest:
        log.info("%s is registered already", record.tag)
        return record
    dress = dress_of(api, base_tag(record.base_sha256), tags, spec, served_parameters(spec, probes.special, context))
    beside = {exported.modelfile: modelfile_of(exported, record, dress), DRESS: dress.model_dump_json(indent=1)}
    keep_files(job_dir, root / record.folder, beside)

    def require_free() -> None:  # the upload may have taken hours, and others may use the same server
        if api.tags().get(record.tag) != tags.get(record.tag):
            registry.note(root, record, deleted=True)
            told = f"somebody else has made {record.tag} at {api.url} meanwhile; it was left alone"
            raise ProviderUnavailable(told, hint="the next attempt takes the next number")

    file = job_dir.path / exported.file
    adapter = exported.route == "adapter"
    log.info("creating %s from %s", record.tag, "the base and its adapter" if adapter else f"a GGUF of {exported.quantized}")
    api.create(
        record.tag,
        files={"base.gguf": base} if adapter else {"model.gguf": file},
        adapters={"adapter.gguf": file} if adapter else {},
        system=dress.system or None,
        template=dress.template or None,
        parameters=dress.parameters,
        licenses=dress.licenses,
        on_progress=told,
        just_before=require_free,
    )
    digest = _created(api, record.tag)
    record = registry.note(root, record, digest=digest, server=draft.server, passed=False, fault="")  # what passed was another
    try:
        answer = require_gate(api, record.tag, probes, draft.perplexity, exact=exported.exact)
    except GateFailed as error:
        registry.note(root, record, fault=str(error))
        raise
    log.info("smoke gate passed; asked %r it says %r", spec.probe, answer)
    return registry.note(root, record, passed=True)


def _created(api: OllamaApi, tag: str) -> str:
    """The digest of what was made just now. Raises ProviderUnavailable where the server does not list it."""
    digest = api.tags().get(tag)
    if digest is None:
        raise ProviderUnavailable(f"{api.url} said that it made {tag} and does not list it", hint="look into the server's log")
    return digest


def promoted(api: OllamaApi, root: Path, record: ModelRecord, spec: JobSpec) -> tuple[ModelRecord, str]:
    """Move the aliases, unless the job leaves that to benchmarks; the record as it is then, and what there is to say."""
    if spec.export.promote == "eval":
        return record, f"the aliases are left to the benchmarks of hafs run, or to you: hafs models promote {record.tag}"
    notes = promote(api, root, record.tag).notes
    for note in notes:
        log.info(note)
    return registry.resolve(root, record.tag), "; ".join(notes)


def served_parameters(spec: JobSpec, special: Sequence[str], context: int) -> dict[str, Any]:
    """What the server is told: where a turn ends, no chance in answers, room for a conversation."""
    stops = [stop for stop in TURN_ENDS if stop in special]
    return {"stop": stops, "temperature": 0, "num_ctx": min(context, max(MIN_CONTEXT, 2 * spec.train.max_length))}


def dress_of(api: OllamaApi, base: str, tags: Container[str], spec: JobSpec, parameters: dict[str, Any]) -> Dress:
    """What the tag of the base says is carried over; what the training needs comes on top."""
    if base not in tags:
        return Dress(system=spec.system, parameters=parameters)
    carried = api.dressing(base)
    stops = list(dict.fromkeys([*parameters["stop"], *carried.parameters.get("stop", [])]))
    return Dress(
        system=spec.system,
        template=carried.template,
        parameters={**carried.parameters, **parameters, "stop": stops},
        licenses=list(carried.licenses),
    )


def modelfile_of(exported: Exported, record: ModelRecord, dress: Dress) -> str:
    """The Modelfile beside an exported GGUF."""
    name = f"./{Path(exported.file).name}"
    if exported.route != "adapter":
        by = f", made by {exported.quantizer}" if exported.quantizer else ""
        about = f"{record.tag}: base and adapter merged, weights in {exported.quantized}{by}"
        return modelfile(name, dress, comment=about)
    about = (
        f"{record.tag}: an adapter on {record.base}\nFROM has to be that very file; a server without ADAPTER needs a merged GGUF"
    )
    return modelfile(base_tag(record.base_sha256), dress, adapter=name, comment=about)


def keep_files(job_dir: JobDir, target: Path, beside: dict[str, str]) -> None:
    """Put the results under their own name: linked where the disk can, else copied. The folder appears whole.

    Args:
        beside: texts of further files, by their names below the folder.
    """
    partial = target.with_name(target.name + ".partial")
    with translate_os_errors(target):
        for folder in (partial, target):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        for source in (job_dir.path / name for name in KEPT):
            if source.is_dir():
                shutil.copytree(source, partial / source.name, copy_function=_link_or_copy)
            elif source.exists():
                _link_or_copy(str(source), str(partial / source.name))
        for name, text in beside.items():
            write_atomic(partial / name, text.encode())
        replace(partial, target)
        sync_folder(target.parent)


def result_of(record: ModelRecord, note: str, runtime: str, train_s: float, steps: int) -> JobResult:
    return JobResult(
        model=record.tag,
        alias=record.view().alias,
        aliases=record.aliases,
        note=note,
        folder=record.folder,
        runtime=runtime,
        perplexity=record.perplexity,
        pairs=record.pairs,
        train_s=train_s,
        steps=steps,
    )


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)
