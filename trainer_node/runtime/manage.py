"""The routes that look after models: tags, ps, show, create, copy, delete, blobs."""

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from aiohttp import web

from config.errors import HafsError, translate_os_errors
from config.files import replace, sync_folder
from trainer_node.runtime.create import check, check_sources, create
from trainer_node.runtime.gguf_file import GgufFile, NotGguf, read_gguf
from trainer_node.runtime.models import ApiError, Model, ModelName, Store
from trainer_node.runtime.options import field
from trainer_node.runtime.pool import Pool
from trainer_node.runtime.requests import json_body, json_reply, line, stream_reply

HIDDEN = ("general.name", "tokenizer.chat_template")  # of the metadata that show tells


class Manage:
    def __init__(self, store: Store, pool: Pool) -> None:
        self._store = store
        self._pool = pool
        self._changing = asyncio.Lock()  # no blob is discarded that a model in the making is about to list

    async def tags(self, request: web.Request) -> web.Response:
        return json_reply({"models": [_tag(model) for model in self._store.models()]})

    async def ps(self, request: web.Request) -> web.Response:
        models = [
            {
                "name": str(entry.model.name),
                "model": str(entry.model.name),
                "size": entry.model.size,
                "digest": entry.model.digest,
                "details": _details(entry.model) | {"parent_model": ""},
                "expires_at": _time(entry.expires),
                "size_vram": entry.model.size if entry.engine.done() and entry.engine.result().gpu else 0,
                "context_length": entry.spec.num_ctx,
            }
            for entry in self._pool.loaded()
        ]
        return json_reply({"models": models})

    async def show(self, request: web.Request) -> web.Response:
        model = self._find(await json_body(request), full=True)
        try:
            gguf = await asyncio.to_thread(read_gguf, model.weights) if model.weights else None
        except (OSError, NotGguf) as error:
            raise ApiError(500, f"the weights of {model.name} cannot be read: {error}") from error
        return json_reply(_shown(model, gguf))

    async def copy(self, request: web.Request) -> web.Response:
        body = await json_body(request)
        source, destination = field(body, "source", str), field(body, "destination", str)
        try:
            name = ModelName.parse(destination)
        except ApiError as error:
            raise ApiError(400, f'destination "{destination}" is invalid') from error
        async with self._changing:
            model = self._store.find(source)
            if model is None:
                raise ApiError(404, f'model "{source}" not found')
            self._store.copy(model, name)
        return web.Response()

    async def delete(self, request: web.Request) -> web.Response:
        """What is loaded under the name goes with it: nobody could ask for its unloading any more."""
        body = await json_body(request)
        async with self._changing:
            model = self._find(body)
            await self._pool.unload(model.name)
            self._store.delete(model)
        return web.Response()

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await json_body(request)
        name = check(body)
        try:
            check_sources(body)
        except ApiError as error:
            return json_reply({"error": str(error)}, error.status, "application/json", chunked=True)
        told = await asyncio.shield(asyncio.create_task(self._create(name, body)))  # a hang-up leaves no half-made model
        if body.get("stream") is False:
            return json_reply(told[-1], 400 if "error" in told[-1] else 200, "application/json")
        response = await stream_reply(request)
        for entry in told:
            await response.write(line(entry))
        return response

    async def _create(self, name: ModelName, body: dict[str, Any]) -> list[dict[str, str]]:
        async with self._changing:
            return await asyncio.to_thread(_told, create(self._store, name, body))

    async def has_blob(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        path = self._store.blob(digest)
        if not path.exists():
            raise ApiError(404, f'blob "{digest}" not found')
        return web.StreamResponse()  # neither length nor type

    async def put_blob(self, request: web.Request) -> web.Response:
        """201: stored; 200: it was there already; 400: the bytes are those of another digest, under which they are kept.

        The body of a blob that is there is not looked at.
        """
        digest = request.match_info["digest"]
        path = self._store.blob(digest)
        if path.exists():
            return web.Response()
        handle, temp = tempfile.mkstemp(prefix=".upload-", dir=path.parent)
        try:
            with translate_os_errors(path), os.fdopen(handle, "wb") as file:
                seen = hashlib.sha256()
                async for chunk in request.content.iter_chunked(2**20):
                    seen.update(chunk)
                    file.write(chunk)
                await asyncio.to_thread(_sync, file)
            got = f"sha256:{seen.hexdigest()}"
            with translate_os_errors(path):
                await asyncio.to_thread(_keep, Path(temp), self._store.blob(got))
        finally:
            _discard(Path(temp))
        if got != digest:
            raise ApiError(400, f'digest mismatch, expected "{digest}", got "{got}"')
        return web.Response(status=201)

    def _find(self, body: dict[str, Any], *, full: bool = False) -> Model:
        name = field(body, "model", str) or field(body, "name", str)
        if not name:
            raise ApiError(400, "model is required")
        model = self._store.find(name)
        if model is None:
            raise ApiError(404, f"model '{ModelName.parse(name) if full else name}' not found")
        return model


def _told(steps: Iterator[str]) -> list[dict[str, str]]:
    """The lines of a create: what happened, then success or the error."""
    told: list[dict[str, str]] = []
    try:
        told += ({"status": status} for status in steps)
    except (ApiError, HafsError) as error:
        return [*told, {"error": str(error)}]
    return [*told, {"status": "success"}]


def _discard(temp: Path) -> None:
    temp.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _keep(temp: Path, blob: Path) -> None:
    """Under its name, for good: a manifest that lists it outlives a power cut."""
    if not blob.exists():  # as it may be since this upload began; then a loaded model may have it open
        replace(temp, blob)
    sync_folder(blob.parent)


def _time(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _details(model: Model) -> dict[str, Any]:
    config = model.config
    return {
        "parent_model": model.parent,
        "format": config.get("model_format", ""),
        "family": config.get("model_family", ""),
        "families": config.get("model_families"),
        "parameter_size": config.get("model_type", ""),
        "quantization_level": config.get("file_type", ""),
    }


def _tag(model: Model) -> dict[str, Any]:
    lengths = {name: model.config[name] for name in ("context_length", "embedding_length") if name in model.config}
    capabilities = {"capabilities": ["completion"]} if model.weights else {}
    return {
        "name": str(model.name),
        "model": str(model.name),
        "modified_at": _time(model.modified),
        "size": model.size,
        "digest": model.digest,
        "details": _details(model) | lengths,
        **capabilities,
    }


def _shown(model: Model, gguf: GgufFile | None) -> dict[str, Any]:
    jinja = str(gguf.metadata.get("tokenizer.chat_template") or "") if gguf else ""
    parameters = [
        f"{name:<30} {json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value}"
        for name, values in sorted(model.parameters.items())
        for value in (values if isinstance(values, list) else [values])
    ]
    optional = {
        "license": "\n".join(model.licenses),
        "parameters": "\n".join(parameters),
        "system": model.system,
        "messages": model.messages,
    }
    count = {"general.parameter_count": gguf.parameter_count} if gguf else {}
    metadata = {name: value for name, value in gguf.metadata.items() if name not in HIDDEN} | count if gguf else {}
    return {
        "modelfile": _modelfile(model),
        "template": model.template if model.template is not None else jinja,
        **{name: value for name, value in optional.items() if value},
        "details": _details(model),
        "model_info": dict(sorted(metadata.items())),
        "tensors": [{"name": t.name, "type": t.type, "shape": t.shape} for t in (gguf.tensors if gguf else ())],
        "capabilities": ["completion"],
        "modified_at": _time(model.modified),
    }


def _modelfile(model: Model) -> str:
    head = '# Modelfile generated by "ollama show"\n# To build a new Modelfile based on this, replace FROM with:\n'
    lines = [f"{head}# FROM {model.name}\n", f"FROM {model.weights}"]
    lines += [f"ADAPTER {path}" for path in model.adapters]
    template = "{{ .Prompt }}" if model.template is None else f'"{model.template}"'
    lines.append(f"TEMPLATE {template}")
    lines += [f"SYSTEM {model.system}"] if model.system else []
    for name, values in sorted(model.parameters.items()):
        lines += [f"PARAMETER {name} {value}" for value in (values if isinstance(values, list) else [values])]
    lines += [f"LICENSE {text}" for text in model.licenses]
    lines += [f"MESSAGE {message['role']} {message['content']}" for message in model.messages]
    return "\n".join(lines) + "\n"
