"""The node's client of Ollama's API: the real server and the embedded runtime alike.

The server believes what create is told, so what is sent is checked here first: a GGUF is what it is given as, parameters are
known and of their type. A stream counts only with its final `success`. Every lower error is translated here, once.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from config.errors import BadRequest, ProviderUnavailable
from trainer_node.runtime.gguf_file import GgufFile, NotGguf, read_gguf
from trainer_node.runtime.models import ApiError, ModelName
from trainer_node.runtime.options import DEFAULTS, merged_options

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 600.0  # without a byte: a cold model of many gigabytes is loaded in it
CHUNK_BYTES = 2**20
OWN_MISTAKES = ("option ", "invalid format")  # 500s of Ollama that no retry mends
Progress = Callable[[int, int], None]  # bytes done, bytes in all; may raise to stop


@dataclass(frozen=True)
class Dressing:
    """What a tag puts around its weights, in the form that `create` takes."""

    template: str  # a Go template; "": the one inside the GGUF
    system: str
    parameters: dict[str, Any]
    licenses: tuple[str, ...]


class OllamaApi:
    """One server. Every method raises ProviderUnavailable (not reachable, 5xx) or BadRequest (refused: never worth a retry)."""

    def __init__(self, url: str, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        timeout = httpx.Timeout(answer_timeout_s, connect=CONNECT_TIMEOUT_S)
        no_idle = httpx.Limits(max_keepalive_connections=0)  # a server may end between two calls, hours apart
        self._http = httpx.Client(base_url=self.url, timeout=timeout, limits=no_idle, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "OllamaApi":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def version(self) -> str:
        with self._translated("GET", "/api/version"):
            return str(self._json("GET", "/api/version")["version"])

    def tags(self) -> dict[str, str]:
        """Digest of the manifest by full name (`model:tag`)."""
        with self._translated("GET", "/api/tags"):
            return {str(model["name"]): str(model["digest"]) for model in self._json("GET", "/api/tags")["models"]}

    def show(self, model: str) -> dict[str, Any]:
        return self._json("POST", "/api/show", {"model": model})

    def dressing(self, model: str) -> Dressing:
        """Template, system message, parameters and licence of a tag, to be carried over to one that is made from it.

        Parameters that say how a machine runs a model (num_gpu, num_thread) are left out.
        """
        shown = self.show(model)
        template, licence = str(shown.get("template") or ""), str(shown.get("license") or "")
        if "{%" in template:  # the server shows the GGUF's own where the tag has none; as a Go template it would be plain text
            template = ""
        parameters = _parameters(str(shown.get("parameters") or ""))
        return Dressing(template, str(shown.get("system") or ""), parameters, (licence,) if licence else ())

    def has_blob(self, digest: str) -> bool:
        with self._translated("HEAD", "/api/blobs"):
            answer = self._http.head(f"/api/blobs/{digest}")
            if answer.status_code == 404:
                return False
            _require_ok(answer)
            return True

    def put_blob(self, path: Path, on_progress: Progress = lambda sent, total: None) -> str:
        """Upload a file unless the server has it; its digest.

        Args:
            on_progress: told bytes sent and bytes in all, after each chunk.
        """
        digest, total = _digest(path), path.stat().st_size
        if self.has_blob(digest):  # a server that has it answers at once and hangs up on a client that is still sending
            return digest

        def chunks() -> Iterator[bytes]:
            sent = 0
            for chunk in _read(path):
                yield chunk
                sent += len(chunk)
                on_progress(sent, total)

        with self._translated("POST", "/api/blobs"):
            headers = {"Content-Length": str(total), "Content-Type": "application/octet-stream"}
            try:
                _require_ok(self._http.post(f"/api/blobs/{digest}", content=chunks(), headers=headers))
            except httpx.TransportError:
                if not self.has_blob(digest):  # it came from somebody else meanwhile, and the server hung up on us
                    raise
        return digest

    def create(
        self,
        model: str,
        *,
        files: dict[str, Path],
        adapters: dict[str, Path] | None = None,
        system: str | None = None,
        template: str | None = None,
        parameters: dict[str, Any] | None = None,
        licenses: Sequence[str] = (),
        on_status: Callable[[str], None] = lambda status: None,
        on_progress: Progress = lambda sent, total: None,
        just_before: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a model of GGUF files: checked, uploaded where they are missing, created, the final `success` seen.

        Args:
            on_progress: told of each file that is uploaded, bytes sent and bytes in all.
            just_before: called once all files are there; what it raises ends it.
        """
        _full_name(model)
        check_files(files.values(), (adapters or {}).values())
        check_parameters(parameters or {})
        body: dict[str, Any] = {"model": model, "files": {n: self.put_blob(path, on_progress) for n, path in files.items()}}
        if adapters:
            body["adapters"] = {name: self.put_blob(path, on_progress) for name, path in adapters.items()}
        just_before()
        optional = {"system": system, "template": template, "parameters": parameters, "license": list(licenses)}
        self._create(body | {name: value for name, value in optional.items() if value}, on_status)

    def _create(self, body: dict[str, Any], on_status: Callable[[str], None]) -> None:
        model, last = body["model"], ""
        with self._translated("POST", "/api/create"), self._http.stream("POST", "/api/create", json=body) as answer:
            _require_ok(answer)
            for line in answer.iter_lines():
                told = dict(json.loads(line))
                if "error" in told:
                    raise BadRequest(f"{self.url} refused to create {model}: {told['error']}")
                last = str(told.get("status", ""))
                on_status(last)
        if last != "success":
            raise ProviderUnavailable(
                f"{self.url} stopped creating {model} after {last!r}", hint="look into the server's log; try again"
            )

    def copy(self, source: str, destination: str) -> None:
        self._json("POST", "/api/copy", {"source": source, "destination": destination})

    def delete(self, model: str) -> None:
        self._json("DELETE", "/api/delete", {"model": model})

    def chat(self, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
        """One whole answer, as the server gave it. The caller looks at `done_reason`: only `stop` is a finished answer."""
        body = {"model": model, "messages": messages, "options": options, "stream": False}
        with self._translated("POST", "/api/chat"):
            answer = self._json("POST", "/api/chat", body)
            answer["message"]["content"]  # of what answers otherwise nobody knows what it is
            return answer

    def tokenize(self, model: str, text: str) -> list[int] | None:
        """Token ids of a prompt, special tokens parsed; None where the server has no such route (a real Ollama)."""
        with self._translated("POST", "/api/tokenize"):
            answer = self._http.post("/api/tokenize", json={"model": model, "prompt": text})
            if answer.status_code == 405 or (answer.status_code == 404 and "json" not in answer.headers.get("Content-Type", "")):
                return None
            _require_ok(answer)
            return list(answer.json()["tokens"])

    def loaded(self) -> list[str]:
        """Full names of the models that are in memory now."""
        with self._translated("GET", "/api/ps"):
            return [str(entry["name"]) for entry in self._json("GET", "/api/ps")["models"]]

    def ask_to_unload(self, model: str) -> None:
        """The answer proves nothing: a model that is in use goes when its last request has ended. See `loaded`."""
        self._json("POST", "/api/generate", {"model": model, "keep_alive": 0})

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._translated(method, path):
            answer = self._http.request(method, path, json=body)
            _require_ok(answer)
            return dict(answer.json()) if answer.content else {}

    @contextmanager
    def _translated(self, method: str, path: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise ProviderUnavailable(
                f"{method} {self.url}{path}: {error or type(error).__name__}",
                hint="is the model server running? see hafs-node doctor",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ProviderUnavailable(f"{method} {self.url}{path}: not an answer of Ollama ({error})") from error


def register_gguf(api: OllamaApi, name: str, path: Path, on_progress: Progress = lambda sent, total: None) -> None:
    """Make `name` from a GGUF file, unless the server has a model of that name. Raises BadRequest."""
    wanted = _full_name(name).casefold()
    if wanted not in {tag.casefold() for tag in api.tags()}:
        api.create(name, files={path.name: path}, on_progress=on_progress)


def check_files(files: Iterable[Path], adapters: Iterable[Path]) -> None:
    """Models are models, adapters are adapters, and all are of one architecture. Raises BadRequest."""
    models = [(path, _header(path)) for path in files]
    loras = [(path, _header(path)) for path in adapters]
    for path, header in models:
        kind = header.metadata.get("general.type", "model")
        if kind not in ("model", "adapter"):
            raise BadRequest(f"{path} is of type {kind}, not a model", hint="give the file that holds the language model")
        if header.is_adapter:
            raise BadRequest(f"{path} is an adapter, not a model", hint="give it as an adapter, on the base it was trained on")
        if not header.tensors or not header.length("block_count"):
            raise BadRequest(f"{path} is no whole language model: no layers", hint="export it again")
    for path, header in loras:
        if not header.is_adapter or header.metadata.get("adapter.type") != "lora":
            raise BadRequest(f"{path} is no LoRA adapter", hint="convert the adapter to GGUF first; give a whole model as a file")
        for base, other in models:
            if header.architecture != other.architecture:
                raise BadRequest(
                    f"{path} is for {header.architecture}, but {base} is {other.architecture}", hint="use the adapter's own base"
                )


def check_parameters(parameters: dict[str, Any]) -> None:
    """Names and types: the server stores anything, and every later answer is a 500. Raises BadRequest."""
    unknown = sorted(set(parameters) - set(DEFAULTS))
    if unknown:
        raise BadRequest(f"unknown model parameters: {', '.join(unknown)}", hint=f"known: {', '.join(sorted(DEFAULTS))}")
    try:
        merged_options(parameters)
    except ApiError as error:
        raise BadRequest(str(error), hint="correct the parameter's value") from error


def _parameters(text: str) -> dict[str, Any]:
    """Of the lines that /api/show tells: a name, blanks, a value; one that is there twice is a list, as `stop` always is."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        name, _, told = line.partition(" ")
        if name not in DEFAULTS:
            continue
        try:
            value = json.loads(told)
        except ValueError:
            value = told.strip().strip('"')  # an escape of Go that JSON does not know
        if name == "stop":
            value = [*found.get(name, []), value]
        found[name] = value
    return found


def _full_name(model: str) -> str:
    try:
        return str(ModelName.parse(model))
    except ApiError as error:
        raise BadRequest(f"{model!r}: {error}", hint="a name is [namespace/]model[:tag], of letters, digits and . _ -") from error


def _header(path: Path) -> GgufFile:
    try:
        return read_gguf(path)
    except (NotGguf, OSError) as error:
        raise BadRequest(f"{path}: {error}", hint="the file is not whole: export or download it again") from error


def _require_ok(answer: httpx.Response) -> None:
    """Raises BadRequest or ProviderUnavailable with the server's own text."""
    if answer.is_success:
        return
    answer.read()
    try:
        text = str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        text = answer.text.strip()
    what = f"{answer.request.method} {answer.request.url}: {answer.status_code} {text}"
    if answer.status_code in (500, 502, 503, 504) and not text.startswith(OWN_MISTAKES):
        raise ProviderUnavailable(what, hint="look into the server's log; try again")
    raise BadRequest(what)


def _digest(path: Path) -> str:
    seen = hashlib.sha256()
    for chunk in _read(path):
        seen.update(chunk)
    return f"sha256:{seen.hexdigest()}"


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
