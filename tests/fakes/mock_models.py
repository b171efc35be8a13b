"""A model server that costs nothing: Ollama, Gemini and OpenAI routes with a chosen latency and chosen faults.

    python mock_models.py PORT       (needs aiohttp; PORT 0 takes a free one; it prints the port it listens on)

Environment: LAT seconds a request (0.2), JITTER share of LAT (0), CAP concurrent requests before 429 (0: none), P429 /
P500 chance of that status (0), RA Retry-After seconds ("" leaves it out), WORDS in an answer (50). For the Ollama
routes also PAR requests at once beyond which the rest wait in order (0: no limit), QUEUE waiting requests beyond which
503 (512), SWAP seconds to load another model, once the running one is idle (0: all are loaded). A real server behaves
so with one model in memory. MODELS: names that the listings have (mock:latest), ps the loaded one. An answer depends on its
prompt; prompt tokens are counted as words and punctuation.

RPM: requests that the Gemini and the OpenAI routes, each for itself, let begin in any 60 s; what comes beyond is answered as a
PerMinute quota, with the wait, and counted as over_rpm: a strict outside witness (0: no limit). FACT=1: an answer repeats what
stands after "Fact: " in the last message, as a good teacher would. SEED makes the faults the same in every run.

Faults, each with its chance (0): P503 that status. DROP the connection closes in mid-answer. TRUNC half of an answer ends as
if it were whole: broken JSON, or a stream without its end. STALL nothing comes for STALL_S seconds (30) after the first bytes.
CUT an Ollama answer is one to a cut prompt: prompt_eval_count is 1. An answer that was dropped or truncated does not count as
ok or answered, but as dropped or truncated; the other two count besides as cut and stalled.

All three kinds of route also stream (NDJSON, server-sent events) and list MODELS. POST /api/pull adds a model to them in a few
steps, unless its name contains "unknown": then the registry does not have it.

GET /stats returns requests, peak, ok, 429s, 500s, 503s, swaps, repeated prompts, faults, wall between first and last; GET
/reset clears them; for a window in a run take the difference of two /stats. GET /prompts lists the SHA-256 of every
prompt answered, in order: the outside witness of a crash test.
"""

import asyncio
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Json = dict[str, Any]

LAT, JITTER = float(os.environ.get("LAT", "0.2")), float(os.environ.get("JITTER", "0"))
CAP = int(os.environ.get("CAP", "0"))
P429, P500 = float(os.environ.get("P429", "0")), float(os.environ.get("P500", "0"))
RA, WORDS = os.environ.get("RA", "1"), int(os.environ.get("WORDS", "50"))
PAR, QUEUE, SWAP = int(os.environ.get("PAR", "0")), int(os.environ.get("QUEUE", "512")), float(os.environ.get("SWAP", "0"))
P503, DROP, TRUNC, CUT = (float(os.environ.get(name, "0")) for name in ("P503", "DROP", "TRUNC", "CUT"))
STALL, STALL_S = float(os.environ.get("STALL", "0")), float(os.environ.get("STALL_S", "30"))
RPM, FACT = int(os.environ.get("RPM", "0")), os.environ.get("FACT", "0") == "1"
DICE = random.Random(os.environ.get("SEED"))
MODELS = os.environ.get("MODELS", "mock:latest").split(",")
VOCABULARY = (
    "load store add shift carry flag bank page stack index byte word mask branch loop table address register value zero "
    "compare jump return push pull clear set copy count test"
).split()
PIECES = 8  # of a streamed answer, about
BUSY = "server busy, please try again.  maximum pending requests exceeded"


class Witness:
    """What the server saw."""

    def __init__(self) -> None:
        self.running = 0
        self.clear()

    def clear(self) -> None:
        """Forget all but what is running."""
        self.counts: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.answered: list[str] = []
        self.first = self.last = 0.0

    def stats(self) -> Json:
        span_s = round(self.last - self.first, 2) if self.last else None
        repeated = sum(times - 1 for times in self.seen.values())
        return {**self.counts, "cur": self.running, "unique": len(self.seen), "repeated": repeated, "span_s": span_s}


WITNESS = Witness()


@dataclass(frozen=True)
class Asked:
    """A request: its key names the prompt, `last` is the text of its last message."""

    key: str
    last: str
    stream: bool

    @property
    def text(self) -> str:
        """The answer: the fact, or WORDS words that depend on the prompt alone."""
        if FACT:
            fact = re.search(r"Fact: (.*)", self.last)
            return fact[1] if fact else "It does something with $FF."
        state, words = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big"), []
        for _ in range(WORDS):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            words.append(VOCABULARY[(state >> 33) % len(VOCABULARY)])
        return " ".join(words) + "."

    @property
    def prompt_tokens(self) -> int:
        return tokens(self.key)

    @property
    def answer_tokens(self) -> int:
        return tokens(self.text) if FACT else WORDS + 1

    def pieces(self) -> list[str]:
        """The answer in pieces."""
        words = re.findall(r"\S+\s*", self.text)
        size = max(1, math.ceil(len(words) / PIECES))
        return ["".join(words[start : start + size]) for start in range(0, len(words), size)] or [""]


def tokens(prompt: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", prompt))


class Minute:
    """The requests of the last 60 s that were let begin."""

    def __init__(self) -> None:
        self.begun: deque[float] = deque()

    def wait_s(self) -> float:
        """0: the request may begin, and is counted; else how long until one may."""
        now = time.monotonic()
        while self.begun and self.begun[0] <= now - 60:
            self.begun.popleft()
        if RPM and len(self.begun) >= RPM:
            return self.begun[0] + 60 - now
        self.begun.append(now)
        return 0.0


MINUTES: dict[str, Minute] = defaultdict(Minute)


def refused(route: str, quota: Callable[[str], Json]) -> web.Response | None:
    """The refusal that befalls a request; `quota` makes the body of a 429 for a wait in seconds."""
    counts = WITNESS.counts
    counts["n"] += 1
    WITNESS.first = WITNESS.first or time.time()
    if route != "ollama" and (wait_s := MINUTES[route].wait_s()):
        counts["over_rpm"] += 1
        counts["429"] += 1
        wait = f"{math.ceil(wait_s * 1000) / 1000:.3f}"
        return web.json_response(quota(wait), status=429, headers={"Retry-After": wait})
    if (CAP and WITNESS.running >= CAP) or DICE.random() < P429:
        counts["429"] += 1
        return web.json_response(quota(RA or "1"), status=429, headers={"Retry-After": RA} if RA else {})
    for status, chance in ((500, P500), (503, P503)):
        if DICE.random() < chance:
            counts[str(status)] += 1
            return web.json_response({"error": {"code": status, "message": "boom", "status": "INTERNAL"}}, status=status)
    return None


async def serve(request: web.Request, asked: Asked, frames: list[bytes], kind: str) -> web.StreamResponse:
    """The answer after the latency: one frame, or those of a stream."""
    counts = WITNESS.counts
    WITNESS.running += 1
    counts["peak"] = max(counts["peak"], WITNESS.running)
    WITNESS.seen[asked.key] += 1
    try:
        await asyncio.sleep(max(0.0, DICE.gauss(LAT, LAT * JITTER)))
    finally:
        WITNESS.running -= 1
        WITNESS.last = time.time()
    fault = next(
        (name for name, chance in (("dropped", DROP), ("truncated", TRUNC), ("stalled", STALL)) if DICE.random() < chance), ""
    )
    counts[fault] += bool(fault)
    if fault not in ("dropped", "truncated"):
        counts["ok"] += 1
        WITNESS.answered.append(hashlib.sha256(asked.key.encode()).hexdigest())
    if not fault and len(frames) == 1:
        return web.Response(body=frames[0], content_type=kind)
    return await send(request, frames, kind, fault)


async def send(request: web.Request, frames: list[bytes], kind: str, fault: str) -> web.StreamResponse:
    """Write frames, or what a fault leaves of them."""
    if len(frames) == 1:
        half = len(frames[0]) // 2
        frames = [frames[0][:half], frames[0][half:]]
        length = half if fault == "truncated" else len(frames[0]) + len(frames[1])
        response = web.StreamResponse(headers={"Content-Type": kind, "Content-Length": str(length)})
    else:
        response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    cut = len(frames) // 2
    for frame in frames[:cut]:
        await response.write(frame)
    if fault == "dropped" and request.transport is not None:
        request.transport.abort()
    if fault == "stalled":
        await asyncio.sleep(STALL_S)
    if fault in ("", "stalled"):
        for frame in frames[cut:]:
            await response.write(frame)
    return response


def encoded(*documents: Json, before: str = "", after: str = "") -> list[bytes]:
    return [f"{before}{json.dumps(document)}{after}".encode() for document in documents]


class Runner:
    """One model in memory, PAR requests at once, first come first served: the head of the queue holds up those behind it."""

    def __init__(self) -> None:
        self.loaded, self.active, self.loading = "", 0, False
        self.queue: deque[tuple[str, asyncio.Future[bool]]] = deque()

    async def enter(self, model: str) -> bool:
        """Wait for a turn; False where the queue is full."""
        if len(self.queue) >= QUEUE:
            return False
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.queue.append((model, turn))
        self.pump()
        if await turn:
            WITNESS.counts["swaps"] += 1
            await asyncio.sleep(SWAP)
            self.loading = False
            self.pump()
        return True

    def leave(self) -> None:
        self.active -= 1
        self.pump()

    def pump(self) -> None:
        while self.queue and not self.loading:
            model, turn = self.queue[0]
            if turn.cancelled():
                self.queue.popleft()
            elif self.active and (self.active >= PAR or (SWAP and model != self.loaded)):
                return
            else:
                self.queue.popleft()
                self.active += 1
                self.loading = bool(SWAP and model != self.loaded)
                self.loaded = model
                turn.set_result(self.loading)


RUNNER = Runner()


async def openai(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    last = str(body["messages"][-1]["content"]) if body["messages"] else ""  # curator asks with none, for the headers
    asked = Asked(json.dumps(body["messages"]), last, bool(body.get("stream")))
    error = {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}
    if refusal := refused("openai", lambda wait: {"error": error}):
        return refusal
    count, answered = asked.prompt_tokens, asked.answer_tokens
    usage = {"prompt_tokens": count, "completion_tokens": answered, "total_tokens": count + answered}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
    if not asked.stream:
        said = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": asked.text}}
        return await serve(request, asked, encoded({**head, "choices": [said], "usage": usage}), "application/json")
    choices: list[list[Json]] = [[{"index": 0, "delta": {"content": piece}, "finish_reason": None}] for piece in asked.pieces()]
    choices += [[{"index": 0, "delta": {}, "finish_reason": "stop"}]]
    chunks: list[Json] = [{**head, "object": "chat.completion.chunk", "choices": choice} for choice in choices]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    frames = [*encoded(*chunks, before="data: ", after="\n\n"), b"data: [DONE]\n\n"]
    return await serve(request, asked, frames, "text/event-stream")


async def ollama(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if PAR and not await RUNNER.enter(body["model"]):
        WITNESS.counts["503"] += 1
        return web.json_response({"error": BUSY}, status=503)
    try:
        return await answer_ollama(request, body)
    finally:
        if PAR:
            RUNNER.leave()


async def answer_ollama(request: web.Request, body: Json) -> web.StreamResponse:
    prompt = body.get("messages", body.get("prompt"))
    last = prompt[-1]["content"] if isinstance(prompt, list) else str(prompt)
    # A real server streams unless it is told not to; this one has always answered whole unless it is told to stream.
    asked = Asked(json.dumps(prompt), last, bool(body.get("stream")))
    if refusal := refused("ollama", lambda wait: {"error": BUSY}):
        return refusal
    cut = DICE.random() < CUT
    WITNESS.counts["cut"] += cut
    head = {"model": body["model"], "created_at": "2026-01-01T00:00:00Z"}
    end = {
        "done": True,
        "done_reason": "stop",
        "total_duration": 1,
        "load_duration": 1,
        "prompt_eval_count": 1 if cut else asked.prompt_tokens,
        "prompt_eval_duration": 1,
        "eval_count": asked.answer_tokens,
        "eval_duration": 1,
    }

    def said(text: str) -> Json:
        return {**head, "message": {"role": "assistant", "content": text}, "response": text}

    if not asked.stream:
        return await serve(request, asked, encoded({**said(asked.text), **end}), "application/json")
    parts = [{**said(piece), "done": False} for piece in asked.pieces()]
    return await serve(request, asked, encoded(*parts, {**said(""), **end}, after="\n"), "application/x-ndjson")


async def gemini(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    last = "".join(part.get("text", "") for part in body["contents"][-1]["parts"])
    asked = Asked(json.dumps(body["contents"]), last, "streamGenerateContent" in request.path)
    if refusal := refused("gemini", gemini_quota):
        return refusal
    count, answered = asked.prompt_tokens, asked.answer_tokens
    usage = {"promptTokenCount": count, "candidatesTokenCount": answered, "totalTokenCount": count + answered}

    def said(text: str, **more: str) -> Json:
        candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0, **more}
        return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "mock"}

    if not asked.stream:
        return await serve(request, asked, encoded(said(asked.text, finishReason="STOP")), "application/json")
    *pieces, end = asked.pieces()
    parts = [*(said(piece) for piece in pieces), said(end, finishReason="STOP")]
    return await serve(request, asked, encoded(*parts, before="data: ", after="\r\n\r\n"), "text/event-stream")


def gemini_quota(wait: str) -> Json:
    details = [
        {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel"}],
        },
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{wait}s"},
    ]
    return {"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": details}}


async def pull(request: web.Request) -> web.StreamResponse:
    model = str((await request.json())["model"])
    steps: list[Json] = [{"status": "pulling manifest"}]
    if "unknown" in model:
        steps += [{"error": "pull model manifest: file does not exist"}]
    else:
        steps += [{"status": "pulling 000", "digest": "000", "total": 300, "completed": done} for done in (100, 200, 300)]
        steps += [{"status": "verifying sha256 digest"}, {"status": "writing manifest"}, {"status": "success"}]
        MODELS.append(model if ":" in model else f"{model}:latest")
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    for line in encoded(*steps, after="\n"):
        await response.write(line)
    return response


async def openai_models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})


async def gemini_models(_: web.Request) -> web.Response:
    return web.json_response({"models": [{"name": f"models/{name}"} for name in MODELS]})


async def stats(_: web.Request) -> web.Response:
    return web.json_response(WITNESS.stats())


async def reset(_: web.Request) -> web.Response:
    WITNESS.clear()
    return web.Response(text="ok")


async def prompts(_: web.Request) -> web.Response:
    return web.json_response(WITNESS.answered)


def listing(names: list[str]) -> web.Response:
    entry = {
        "modified_at": "2026-01-01T00:00:00Z",
        "size": 1,
        "size_vram": 1,
        "digest": "0" * 64,
        "expires_at": "2099-01-01T00:00:00Z",
        "details": {},
    }
    return web.json_response({"models": [{"name": name, "model": name, **entry} for name in names]})


async def tags(_: web.Request) -> web.Response:
    return listing(MODELS)


async def ps(_: web.Request) -> web.Response:
    return listing([RUNNER.loaded] if RUNNER.loaded else MODELS[:1])


async def version(_: web.Request) -> web.Response:
    return web.json_response({"version": "0.34.1"})


ROUTES = [
    web.post("/v1/chat/completions", openai),
    web.post("/api/chat", ollama),
    web.post("/api/generate", ollama),
    web.post("/api/pull", pull),
    web.get("/v1/models", openai_models),
    web.get("/v1beta/models", gemini_models),
    web.get("/api/version", version),
    web.get("/api/tags", tags),
    web.get("/api/ps", ps),
    web.post("/{tail:v1(beta)?/models/.*}", gemini),
    web.get("/stats", stats),
    web.get("/reset", reset),
    web.get("/prompts", prompts),
]


async def main(port: int) -> None:
    app = web.Application()
    app.add_routes(ROUTES)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
