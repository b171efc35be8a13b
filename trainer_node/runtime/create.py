"""`POST /api/create`: a model from blobs or from another model, told step by step.

As Ollama does, it believes what it is told: the kind of a GGUF decides where it goes, so a LoRA given as a model makes a model
that cannot answer, and the values of parameters are stored unchecked. The client checks before it sends. Nothing is
converted, quantized or pulled.
"""

import json
import posixpath
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from trainer_node.runtime.gguf_file import GgufFile, NotGguf, read_gguf
from trainer_node.runtime.go_template import GoTemplate, TemplateError
from trainer_node.runtime.models import ApiError, Layer, Model, ModelName, Store
from trainer_node.runtime.options import field
from trainer_node.runtime.templates import family_of


@dataclass(frozen=True)
class Step:
    """A layer of the new model and the line that tells about it; "" tells nothing."""

    layer: Layer
    status: str


def check(body: dict[str, Any]) -> ModelName:
    """What can be refused before the first line. Raises ApiError (400)."""
    name = ModelName.parse(field(body, "model", str) or field(body, "name", str))
    for text in ("from", "template", "system"):
        field(body, text, str)
    field(body, "parameters", dict)
    field(body, "messages", list)
    if not isinstance(body.get("license"), str | list | None):
        raise ApiError(400, "invalid license: a text or a list of texts is expected")
    for files in (field(body, "files", dict), field(body, "adapters", dict)):
        for path, digest in files.items():
            if not digest or not isinstance(digest, str):
                raise ApiError(400, "invalid digest format")
            clean = posixpath.normpath(path)
            if "\\" in path or ":" in path or clean.startswith(("/", "..")):
                raise ApiError(400, "file path must be relative")
    return name


def check_sources(body: dict[str, Any]) -> None:
    """The second look, whose refusals Ollama sends in another framing. Raises ApiError (400)."""
    if not body.get("from") and body.get("files") is None:
        raise ApiError(400, "neither 'from' or 'files' was specified")
    if not body.get("from") and not body["files"]:
        raise ApiError(400, "unknown type")
    if len(body.get("adapters") or {}) > 1:
        raise ApiError(400, "only one adapter is currently supported")


def create(store: Store, name: ModelName, body: dict[str, Any]) -> Generator[str]:
    """Make the model; yields what happens. The manifest is written last.

    Raises:
        ApiError: nothing was made.
    """
    if body.get("quantize") or body.get("quantization"):
        yield "parsing GGUF"
        raise ApiError(400, "quantizing is not supported: quantize GGUF models with llama.cpp tools before importing")
    steps: list[Step] = []
    config: dict[str, Any] = {}
    if body.get("from"):
        parent = store.find(body["from"])
        if parent is None:
            yield "pulling manifest"
            raise ApiError(404, f"pull model manifest: '{body['from']}' is not on this server, which does not pull")
        steps, config = _inherited(parent), dict(parent.config)
    elif body.get("files"):
        yield "parsing GGUF"
        steps, config = _from_files(store, body["files"], config)
    if body.get("adapters"):
        yield "parsing GGUF"
        added, config = _from_files(store, body["adapters"], config)
        steps += added
    steps = _in_order(_dressed(store, steps, body))
    yield from (step.status for step in steps if step.status)
    yield "writing manifest"
    store.write(name, config, [step.layer for step in steps])


def _inherited(parent: Model) -> list[Step]:
    source = str(parent.name)
    layers = [replace(layer, source=source) if layer.kind == "model" else layer for layer in parent.layers]
    return [Step(layer, f"using existing layer {layer.digest}") for layer in layers]


def _from_files(store: Store, files: dict[str, str], config: dict[str, Any]) -> tuple[list[Step], dict[str, Any]]:
    steps: list[Step] = []
    for digest in files.values():
        path = store.blob(digest)
        try:
            gguf = read_gguf(path)
        except FileNotFoundError as error:
            raise ApiError(400, f"open {path}: no such file or directory") from error
        except NotGguf as error:
            raise ApiError(400, str(error)) from error
        kind = "adapter" if gguf.is_adapter else "model"
        steps.append(Step(Layer(kind, digest, path.stat().st_size), f"using existing layer {digest}"))
        if not gguf.is_adapter:
            steps += _family_steps(store, gguf)
            config = _config(gguf, config)
    return steps, config


def _family_steps(store: Store, gguf: GgufFile) -> list[Step]:
    family = family_of(str(gguf.metadata.get("tokenizer.chat_template") or ""))
    if family is None:
        return []
    template, _ = store.add("template", family.template.encode())
    parameters, there = store.add("params", _go_json({"stop": family.stops}))
    told = _told(parameters, there)
    return [Step(template, f"using autodetected template {family.name}"), Step(parameters, told)]


def _in_order(steps: list[Step]) -> list[Step]:
    """One layer of parameters, the last, after all others but the messages."""
    last = {step.layer.kind: step for step in steps if step.layer.kind in ("params", "messages")}
    rest = [step for step in steps if step.layer.kind not in last]
    return rest + [last[kind] for kind in ("params", "messages") if kind in last]


def _dressed(store: Store, steps: list[Step], body: dict[str, Any]) -> list[Step]:
    """Template, system, licence, parameters and messages of the request replace or join those that are there."""
    if body.get("template"):
        _check_template(body["template"])
        steps = _replaced(store, steps, "template", body["template"].encode())
    if body.get("system"):
        steps = _replaced(store, steps, "system", body["system"].encode())
    licenses = body.get("license") or []
    for text in [licenses] if isinstance(licenses, str) else licenses:
        layer, there = store.add("license", str(text).encode())
        steps = [*steps, Step(layer, _told(layer, there))]
    if body.get("parameters"):
        merged: dict[str, Any] = {}
        if not body.get("template"):  # the stops of a family belong to its template
            for step in steps:
                if step.layer.kind == "params":
                    merged |= json.loads(store.blob(step.layer.digest).read_bytes())
        steps = _replaced(store, steps, "params", _go_json(merged | body["parameters"]))
    elif body.get("template"):
        steps = [step for step in steps if not (step.layer.kind == "params" and not body.get("from"))]
    if body.get("messages"):
        steps = _replaced(store, steps, "messages", _go_json(body["messages"], sort=False))
    return steps


def _check_template(text: str) -> None:
    try:
        GoTemplate(text)
    except (TemplateError, RecursionError) as error:
        raise ApiError(400, f"template error: {error}") from error


def _replaced(store: Store, steps: list[Step], kind: str, data: bytes) -> list[Step]:
    layer, there = store.add(kind, data)
    return [*(step for step in steps if step.layer.kind != kind), Step(layer, _told(layer, there))]


def _told(layer: Layer, there: bool) -> str:
    return f"{'using existing' if there else 'creating new'} layer {layer.digest}"


def _go_json(value: Any, *, sort: bool = True) -> bytes:
    """As Go's encoder writes it, so that the same parameters are the same layer there and here."""
    text = json.dumps(value, sort_keys=sort, separators=(",", ":"), ensure_ascii=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode() + b"\n"


def _config(gguf: GgufFile, before: dict[str, Any]) -> dict[str, Any]:
    count = gguf.parameter_count
    return {
        "model_format": "gguf",
        "model_family": gguf.architecture,
        "model_families": [*before.get("model_families", []), gguf.architecture],
        "model_type": _human(count),
        "file_type": gguf.file_type,
        "context_length": gguf.length("context_length"),
        "embedding_length": gguf.length("embedding_length"),
    }


def _human(count: int) -> str:
    """134515008 -> 134.52M, 14000000000 -> 14B."""
    for unit, sign, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else digits}f}{sign}"
    return f"{count // 1000}K" if count >= 1000 else str(count)
