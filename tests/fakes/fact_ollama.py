"""An Ollama server whose model repeats the fact it was given: the teacher of tests that are not about a model.

    python -m tests.fakes.fact_ollama PORT_FILE

Environment: LAT seconds a request (0.02), WRONG: each WRONG-th answer is wrong (0: none). It listens on a free loopback port and
writes it to PORT_FILE. GET /prompts lists the SHA-256 of every prompt that was answered, GET /asked of every one that came: the
outside witness of a crash.
"""

import asyncio
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from aiohttp import web

from tests.fakes.served import serve

LATENCY_S = float(os.environ.get("LAT", "0.02"))
WRONG = int(os.environ.get("WRONG", "0"))
MODEL = "teacher:latest"
asked: list[str] = []
answered: list[str] = []


async def chat(request: web.Request) -> web.Response:
    body = await request.json()
    prompt = json.dumps(body["messages"])
    asked.append(hashlib.sha256(prompt.encode()).hexdigest())
    await asyncio.sleep(LATENCY_S)
    fact = re.search(r"Fact: (.*)", body["messages"][-1]["content"])
    answered.append(hashlib.sha256(prompt.encode()).hexdigest())
    text = fact[1] if fact and not (WRONG and len(answered) % WRONG == 0) else "It does something with $FF."
    reply = {
        "model": body["model"],
        "created_at": "2026-01-01T00:00:00Z",
        "message": {"role": "assistant", "content": text},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": len(prompt) // 4,
        "eval_count": len(text) // 4,
    }
    return web.json_response(reply)


async def prompts(_: web.Request) -> web.Response:
    return web.json_response(answered)


async def everything(_: web.Request) -> web.Response:
    return web.json_response(asked)


async def tags(_: web.Request) -> web.Response:
    model = {"name": MODEL, "model": MODEL, "modified_at": "2026-01-01T00:00:00Z", "size": 1, "digest": "0" * 64, "details": {}}
    return web.json_response({"models": [model]})


async def version(_: web.Request) -> web.Response:
    return web.json_response({"version": "0.34.1"})


async def main(port_file: Path) -> None:
    app = web.Application()
    app.add_routes([web.post("/api/chat", chat), web.get("/api/tags", tags)])
    app.add_routes([web.get("/api/version", version), web.get("/prompts", prompts), web.get("/asked", everything)])
    await serve(app, port_file)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
