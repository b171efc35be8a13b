"""One loaded model: a child process with llama.cpp's server inside, spoken to over HTTP on loopback.

A process of its own because the library holds Python's global lock while it loads and cannot be freed while it generates: ending
the process gives every byte back, at any moment. The child lives as long as its standard input is open, so it never outlives the
server. Its port is guarded by a key that only the two know.
"""

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import psutil

from trainer_node.runtime.models import ApiError

LOAD_TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 10.0
LINE_BYTES = 2**20
DIED = "the model runner has unexpectedly stopped"
FIELDS = ["content", "stop", "stop_type", "tokens_predicted", "timings", "completion_probabilities"]  # not the prompt once more
# How long OpenMP's threads spin at a barrier: its own default makes an engine ten times slower once anything else uses a core.
SPIN_COUNT = "10000"


class NoRoom(ApiError):
    """There is too little memory for the model now."""


@dataclass(frozen=True)
class EngineSpec:
    """What is loaded. `num_ctx` is the context of one request, in tokens; `parallel` requests are batched together."""

    weights: str
    adapters: tuple[str, ...]
    num_ctx: int
    parallel: int
    threads: int


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one has the reason and the counts."""

    text: str
    logprobs: list[dict[str, Any]]
    done_reason: str = ""  # stop, length
    eval_count: int = 0
    prompt_eval_ns: int = 0
    eval_ns: int = 0


class Engine:
    """The parent's side. Made by `start`, ended by `stop`."""

    def __init__(self, spec: EngineSpec, process: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self.spec = spec
        self._process = process
        self._session = session
        self.gpu = False
        self._bos: list[int] = []

    @classmethod
    async def start(cls, spec: EngineSpec, needed_bytes: int = 0) -> "Engine":
        """Load the model, unless `needed_bytes` of memory are not free (looked at where no GPU takes a part).

        Raises:
            NoRoom: too little memory.
            ApiError: 500, with llama.cpp's reason.
        """
        key = secrets.token_urlsafe(24)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "trainer_node.runtime.runner"),
            env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            greeting = await asyncio.wait_for(
                _greet(process, {**asdict(spec), "needed_bytes": needed_bytes, "key": key}), LOAD_TIMEOUT_S
            )
        except TimeoutError as error:
            await _end(process)
            raise ApiError(500, "timed out waiting for the model to load") from error
        except BaseException:
            await _end(process)
            raise
        engine = cls(spec, process, _session(greeting["url"], key))
        engine.gpu = bool(greeting["gpu"])
        try:
            engine._bos = await engine._tokenize("")
        except BaseException:
            await engine.stop()
            raise
        return engine

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @property
    def mapped_bytes(self) -> int:
        """Memory that holds its files, the weights above all: the system calls it available, yet the engine needs it."""
        try:
            return int(getattr(psutil.Process(self._process.pid).memory_info(), "shared", 0))  # Linux alone tells
        except psutil.Error:
            return 0

    async def stop(self) -> None:
        await self._session.close()
        await _end(self._process)

    async def tokenize(self, text: str) -> list[int]:
        """Tokens of a prompt, special tokens parsed; a BOS that the model adds is not doubled by one that the text brings."""
        tokens = await self._tokenize(text)
        return tokens[len(self._bos) :] if self._bos and tokens[: 2 * len(self._bos)] == 2 * self._bos else tokens

    async def tokenize_text(self, text: str) -> list[int]:
        """Tokens of what somebody wrote, special tokens not parsed and none added."""
        return list((await self._call("/tokenize", {"content": text, "add_special": False, "parse_special": False}))["tokens"])

    def with_bos(self, tokens: list[int]) -> list[int]:
        """A prompt in parts, with the BOS that the model adds unless it is there."""
        return tokens if tokens[: len(self._bos)] == self._bos else [*self._bos, *tokens]

    async def apply_template(self, messages: list[dict[str, Any]]) -> str:
        """The prompt by the Jinja template inside the GGUF. Raises ApiError (400) where it refuses the messages."""
        answer = await self._call("/apply-template", {"messages": messages})
        return str(answer["prompt"])

    async def complete(self, prompt: list[int], request: dict[str, Any], *, stream: bool) -> AsyncGenerator[Piece]:
        """Generate from tokens; the last piece has a reason. Closing the iterator stops the generation. Raises ApiError.

        Args:
            stream: False gives one piece: every other one takes time from the cores that generate.
        """
        body = {"prompt": prompt, "stream": stream, "cache_prompt": True, "response_fields": FIELDS, **request}
        ended = False
        async with self._post("/completion", body) as response:
            if not stream:
                yield _piece(await response.json(content_type=None), whole=True)
                return
            async for line in response.content:
                if line.startswith(b"data: "):
                    piece = _piece(json.loads(line[6:]))
                    ended = bool(piece.done_reason)
                    yield piece
                elif line.startswith(b"error: "):
                    raise ApiError(500, _reason(line[7:]))
        if not ended:
            raise ApiError(500, f"{DIED} in the middle of its answer")

    async def _tokenize(self, text: str) -> list[int]:
        return list((await self._call("/tokenize", {"content": text, "add_special": True, "parse_special": True}))["tokens"])

    async def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._post(path, body) as response:
            return dict(await response.json(content_type=None))

    @asynccontextmanager
    async def _post(self, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.post(path, json=body) as response:
                if response.status != 200:
                    raise ApiError(response.status, _reason(await response.read()))
                yield response
        except aiohttp.ClientError as error:
            raise ApiError(500, f"{DIED}: {error}") from error


def _session(url: str, key: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0, force_close=True),  # llama.cpp drops idle connections as we reuse them
        headers={"Authorization": f"Bearer {key}"},
        timeout=aiohttp.ClientTimeout(),
        read_bufsize=LINE_BYTES,
    )


async def _greet(process: asyncio.subprocess.Process, request: dict[str, Any]) -> dict[str, Any]:
    """Hand the child its request; its answer once the model is loaded: `url`, and `gpu` if it runs on one."""
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(request).encode() + b"\n")
    await process.stdin.drain()
    line = await process.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"error": f"the model runner ended with code {await process.wait()}"}
    if answer.get("no_room"):
        raise NoRoom(500, answer["error"])
    if "error" in answer:
        raise ApiError(500, f"unable to load model: {answer['error']}")
    return answer


async def _end(process: asyncio.subprocess.Process) -> None:
    """There is nothing to save in the child: kill it, whatever it is doing."""
    if process.returncode is None:
        try:
            process.kill()
        except ProcessLookupError:
            return  # it ended by itself just now
    await asyncio.wait_for(process.wait(), EXIT_TIMEOUT_S)


def _reason(body: bytes) -> str:
    try:
        error = json.loads(body)["error"] if b'"error"' in body else json.loads(body)
        return str(error["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _piece(data: dict[str, Any], *, whole: bool = False) -> Piece:
    """The last of several has no probabilities of its own, but those of all once more."""
    if "error" in data:
        raise ApiError(500, str(data["error"].get("message", data["error"])))
    logprobs = [_logprob(entry) for entry in data.get("completion_probabilities", [])]
    if not data["stop"]:
        return Piece(data["content"], logprobs)
    timings = data["timings"]
    return Piece(
        data["content"],
        logprobs if whole else [],
        "length" if data["stop_type"] == "limit" else "stop",
        data["tokens_predicted"],
        int(timings["prompt_ms"] * 1e6),
        int(timings["predicted_ms"] * 1e6),
    )


def _logprob(entry: dict[str, Any]) -> dict[str, Any]:
    kept = {name: entry[name] for name in ("token", "logprob", "bytes")}
    top = [{name: other[name] for name in ("token", "logprob", "bytes")} for other in entry.get("top_logprobs", [])]
    return kept | ({"top_logprobs": top} if top else {})
