"""A model server that costs nothing: Ollama, Gemini and OpenAI routes with a chosen latency and chosen faults.

    python mock_models.py PORT       (needs aiohttp; PORT 0 takes a free one; it prints the port it listens on)

Environment: LAT seconds a request (0.2), JITTER share of LAT (0), CAP concurrent requests before 429 (0: none), P429 /
P500 chance of that status (0), RA Retry-After seconds ("" leaves it out), WORDS in an answer (50). For the Ollama
routes also PAR requests at once beyond which the rest wait in order (0: no limit), QUEUE waiting requests beyond which
503 (512), SWAP seconds to load another model, once the running one is idle (0: all are loaded). A real server behaves
so with one model in memory. MODELS: names that tags lists (mock:latest), ps the loaded one. An answer depends on its
prompt; prompt tokens are counted as words and punctuation.

GET /stats returns requests, peak, ok, 429s, 500s, 503s, swaps, repeated prompts, wall between first and last; GET
/reset clears them; for a window in a run take the difference of two /stats. GET /prompts lists the SHA-256 of every
prompt answered, in order: the outside witness of a crash test.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter, deque
from typing import Any

from aiohttp import web

Json = dict[str, Any]

LAT, JITTER = float(os.environ.get("LAT", "0.2")), float(os.environ.get("JITTER", "0"))
CAP = int(os.environ.get("CAP", "0"))
P429, P500 = float(os.environ.get("P429", "0")), float(os.environ.get("P500", "0"))
RA, WORDS = os.environ.get("RA", "1"), int(os.environ.get("WORDS", "50"))
PAR, QUEUE, SWAP = int(os.environ.get("PAR", "0")), int(os.environ.get("QUEUE", "512")), float(os.environ.get("SWAP", "0"))
MODELS = os.environ.get("MODELS", "mock:latest").split(",")
VOCABULARY = (
    "load store add shift carry flag bank page stack index byte word mask branch loop table address register value zero "
    "compare jump return push pull clear set copy count test"
).split()
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


def answer(prompt: str) -> str:
    """WORDS words that depend on the prompt alone."""
    state, words = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big"), []
    for _ in range(WORDS):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        words.append(VOCABULARY[(state >> 33) % len(VOCABULARY)])
    return " ".join(words) + "."


def tokens(prompt: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", prompt))


async def serve(key: str, body: Json, error429: Json) -> web.Response:
    """`body` after the latency, unless a fault comes first. `key` is the prompt."""
    counts = WITNESS.counts
    counts["n"] += 1
    WITNESS.first = WITNESS.first or time.time()
    if (CAP and WITNESS.running >= CAP) or random.random() < P429:
        counts["429"] += 1
        return web.json_response(error429, status=429, headers={"Retry-After": RA} if RA else {})
    if random.random() < P500:
        counts["500"] += 1
        return web.json_response({"error": {"code": 500, "message": "boom", "status": "INTERNAL"}}, status=500)
    WITNESS.running += 1
    counts["peak"] = max(counts["peak"], WITNESS.running)
    WITNESS.seen[key] += 1
    try:
        await asyncio.sleep(max(0.0, random.gauss(LAT, LAT * JITTER)))
    finally:
        WITNESS.running -= 1
        WITNESS.last = time.time()
    counts["ok"] += 1
    WITNESS.answered.append(hashlib.sha256(key.encode()).hexdigest())
    return web.json_response(body)


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


async def openai(request: web.Request) -> web.Response:
    body = await request.json()
    key = json.dumps(body["messages"])
    count = tokens(key)
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer(key)}}],
        "usage": {"prompt_tokens": count, "completion_tokens": WORDS + 1, "total_tokens": count + WORDS + 1},
    }
    return await serve(
        key, reply, {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
    )


async def ollama(request: web.Request) -> web.Response:
    body = await request.json()
    if PAR and not await RUNNER.enter(body["model"]):
        WITNESS.counts["503"] += 1
        return web.json_response({"error": BUSY}, status=503)
    try:
        return await answer_ollama(body)
    finally:
        if PAR:
            RUNNER.leave()


async def answer_ollama(body: Json) -> web.Response:
    key = json.dumps(body.get("messages", body.get("prompt")))
    text = answer(key)
    reply = {
        "model": body["model"],
        "created_at": "2026-01-01T00:00:00Z",
        "message": {"role": "assistant", "content": text},
        "response": text,
        "done": True,
        "done_reason": "stop",
        "total_duration": 1,
        "load_duration": 1,
        "prompt_eval_count": tokens(key),
        "prompt_eval_duration": 1,
        "eval_count": WORDS + 1,
        "eval_duration": 1,
    }
    return await serve(key, reply, {"error": BUSY})


async def gemini(request: web.Request) -> web.Response:
    body = await request.json()
    key = json.dumps(body["contents"])
    count = tokens(key)
    reply = {
        "candidates": [{"content": {"role": "model", "parts": [{"text": answer(key)}]}, "finishReason": "STOP", "index": 0}],
        "usageMetadata": {"promptTokenCount": count, "candidatesTokenCount": WORDS + 1, "totalTokenCount": count + WORDS + 1},
        "modelVersion": "mock",
    }
    details = [
        {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel"}],
        },
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{RA or 1}s"},
    ]
    error = {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": details}
    return await serve(key, reply, {"error": error})


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
