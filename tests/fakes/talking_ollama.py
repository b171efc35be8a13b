"""An Ollama server whose model talks slowly, to be interrupted: it says back the last word of the question, WORDS times.

    python -m tests.fakes.talking_ollama PORT_FILE

Environment: PIECE_S seconds a word (0.05), WORDS of an answer (5), PORT to listen on. A question that ends with one of these
gets something else: escape (terminal sequences), die (the process ends in the middle of its answer), long (400 words), broken (an
error inside the answer), wrong (400), down (500), first (no word for a minute), nothing (an empty answer). A prompt of more words
than num_ctx is refused, as a real server does. GET /witness: every request that came (`asked`), and what was said to those who
hung up (`left`).
"""

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.fakes.served import serve

PIECE_S = float(os.environ.get("PIECE_S", "0.05"))
WORDS = int(os.environ.get("WORDS", "5"))
MODELS = ("hafs-coder:latest", "other:latest")
HEAD = {"created_at": "2026-01-01T00:00:00Z"}
ESCAPES = ["\x1b]0;owned\x07", "\x1b[31mred\x1b", "[0m \x9b2J", "done\x00\x08"]
asked: list[dict[str, Any]] = []
left: list[str] = []


def pieces_of(word: str) -> list[str]:
    if word in ("escape", "nothing"):
        return ESCAPES if word == "escape" else []
    return [f"{word} " for _ in range(400 if word == "long" else WORDS)]


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    asked.append(body)
    word = body["messages"][-1]["content"].split()[-1]
    words = sum(len(re.findall(r"[^\W\d_]+|\d+", message["content"])) for message in body["messages"])
    num_ctx = body["options"]["num_ctx"]
    if words >= num_ctx:
        text = f"request ({words} tokens) exceeds the available context size ({num_ctx} tokens), try increasing it"
        return web.json_response({"error": text}, status=400)
    if word == "wrong":
        return web.json_response({"error": "wrong in every way"}, status=400)
    if word == "down":
        return web.json_response({"error": "no memory for the model"}, status=500)
    pieces = pieces_of(word)
    cut = len(pieces) > body["options"]["num_predict"]
    pieces = pieces[: body["options"]["num_predict"]]
    end = {"done": True, "done_reason": "length" if cut else "stop", "prompt_eval_count": words, "eval_count": len(pieces)}
    if body.get("stream") is False:
        await asyncio.sleep(PIECE_S * len(pieces))
        return web.json_response({"model": body["model"], **HEAD, **said("".join(pieces)), **end})
    return await stream(request, body["model"], word, pieces, end)


async def stream(request: web.Request, model: str, word: str, pieces: list[str], end: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    told = ""
    try:
        for _ in range(int(60 / PIECE_S) if word == "first" else 0):
            await asyncio.sleep(PIECE_S)
            if request.transport is None:
                raise ConnectionError
        for number, piece in enumerate(pieces):
            await asyncio.sleep(PIECE_S)
            if number == len(pieces) // 2 and word == "die":
                os._exit(1)
            if number == len(pieces) // 2 and word == "broken":
                await response.write(json.dumps({"error": "out of memory"}).encode() + b"\n")
                return response
            told += piece
            await response.write(json.dumps({"model": model, **HEAD, **said(piece), "done": False}).encode() + b"\n")
        await response.write(json.dumps({"model": model, **HEAD, **said(""), **end}).encode() + b"\n")
    except asyncio.CancelledError:
        left.append(told)
        raise
    except ConnectionError:
        left.append(told)
    return response


def said(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


async def witness(_: web.Request) -> web.Response:
    return web.json_response({"asked": asked, "left": left})


async def tags(_: web.Request) -> web.Response:
    entry = {"modified_at": "2026-01-01T00:00:00Z", "size": 1, "digest": "5" * 64, "details": {}}
    return web.json_response({"models": [{"name": name, "model": name, **entry} for name in MODELS]})


async def version(_: web.Request) -> web.Response:
    return web.json_response({"version": "0.34.1"})


async def main(port_file: Path) -> None:
    app = web.Application()
    app.add_routes([web.post("/api/chat", chat), web.get("/api/tags", tags)])
    app.add_routes([web.get("/api/version", version), web.get("/witness", witness)])
    await serve(app, port_file, int(os.environ.get("PORT", "0")))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
