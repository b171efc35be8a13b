"""Registration: version first, gate, then the alias. A tag that hafs did not make is never moved.

Run again for the same job it registers the same version, from the same files.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from config.contracts.job import JobResult, JobSpec
from config.files import sync_folder
from trainer_node import registry
from trainer_node.export.gate import require_gate
from trainer_node.jobdir import JobDir
from trainer_node.ollama import OllamaApi
from trainer_node.registry import ModelRecord
from trainer_node.train.base import BaseModel

log = logging.getLogger("hafs")
KEPT = ("adapter", "adapter.gguf", "job.json", "metrics.jsonl", "training_stats.json", "evaluation.json")
CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")
MIN_CONTEXT = 2048


@dataclass(frozen=True)
class Probe:
    """What the gate asks, and the length of that prompt as it was trained."""

    messages: list[dict[str, str]]
    prompt_tokens: int
    special: list[str]


def register(api: OllamaApi, draft: ModelRecord, base: BaseModel, spec: JobSpec, job_dir: JobDir, probe: Probe) -> ModelRecord:
    """Create the next version at the server, pass the gate, record it.

    Raises:
        GateFailed: the version stays at the server and in the registry for inspection, but does not count.
    """
    root = job_dir.root
    tags = api.tags()
    record = registry.reserve(root, draft, tags)
    if record.passed and tags.get(record.tag) == record.digest:
        log.info("%s is registered already", record.tag)
        return record
    keep_files(job_dir, root / record.folder)
    stops = [stop for stop in CHATML_STOPS if stop in probe.special]
    log.info("creating %s from %s and its adapter", record.tag, base.tag)
    api.create(
        record.tag,
        files={"base.gguf": base.path},
        adapters={"adapter.gguf": job_dir.adapter_gguf},
        system=spec.system or None,
        parameters={"stop": stops, "temperature": 0, "num_ctx": min(base.context, max(MIN_CONTEXT, 2 * spec.train.max_length))},
    )
    answer = require_gate(api, record.tag, probe.prompt_tokens, probe.messages, probe.special)
    log.info("smoke gate passed; asked %r it says %r", spec.probe, answer)
    record = record.model_copy(update={"passed": True, "digest": api.tags()[record.tag]})
    registry.save(root, record)
    return record


def move_alias(api: OllamaApi, root: Path, record: ModelRecord) -> tuple[ModelRecord, str]:
    """Copy the version to `<name>:latest`, unless someone else made the model of that name.

    Returns:
        The record, with its alias if it was moved, and else a note that says why not.
    """
    alias = f"{record.name}:latest"
    present = {digest for tag, digest in api.tags().items() if tag.casefold() == alias.casefold()}  # as the server compares
    ours = {other.digest for other in registry.records(root) if other.digest}
    if present - ours:
        note = f"{alias} at the server was not made by hafs and was left alone; use {record.tag}, or copy it yourself"
        log.info(note)
        return record, note
    api.copy(record.tag, alias)
    record = record.model_copy(update={"alias": alias})
    registry.save(root, record)
    log.info("%s is now %s", alias, record.tag)
    return record, ""


def keep_files(job_dir: JobDir, target: Path) -> None:
    """Put the results under their own name: linked where the disk can, else copied. The folder appears whole."""
    partial = target.with_name(target.name + ".partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in KEPT:
        source = job_dir.path / name
        if source.is_dir():
            shutil.copytree(source, partial / name, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(source), str(partial / name))
    os.replace(partial, target)
    sync_folder(target.parent)


def result_of(record: ModelRecord, note: str, runtime: str, train_s: float, steps: int) -> JobResult:
    return JobResult(
        model=record.tag,
        alias=record.alias,
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
