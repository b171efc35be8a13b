"""The scheduler over its providers against a bare aiohttp loop, side by side in one run: wall time and the ratio to that floor.

    python tests/bench/bench_scheduler.py [REQUESTS] [IN_FLIGHT] [ROUNDS]       (2000 128 3)

The server is tests/fakes/mock_models.py with 200 ms latency. Every answer is appended to a file, as a campaign would.
The contestants take turns; the best of the rounds counts, since what else the machine does can only slow one down.
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any

import aiohttp

from agents.budget import Budget
from agents.lanes import Lane
from agents.providers.base import Provider
from agents.providers.gemini import GeminiProvider
from agents.providers.ollama import OllamaProvider
from agents.scheduler import Scheduler
from agents.task import Outcome, Sampling, Task
from config.contracts.sample import Message

LATENCY_S = 0.2
MOCK = Path(__file__).parents[1] / "fakes" / "mock_models.py"
Contestant = Callable[[str, int, int, IO[str]], Coroutine[Any, Any, None]]


async def floor(url: str, requests: int, in_flight: int, out: IO[str]) -> None:
    todo = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def worker() -> None:
            for number in todo:
                body = {"model": "mock", "messages": [{"role": "user", "content": f"p{number}"}], "stream": False}
                async with session.post(f"{url}/api/chat", json=body) as reply:
                    out.write(json.dumps(await reply.json()) + "\n")

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(worker())


async def sdk(url: str, requests: int, in_flight: int, out: IO[str]) -> None:
    """The provider without the scheduler: what the SDK costs by itself."""
    todo = iter(range(requests))
    provider = OllamaProvider(url)

    async def worker() -> None:
        for number in todo:
            completion = await provider.generate("mock", [Message(role="user", content=f"p{number}")], Sampling())
            out.write(json.dumps({"text": completion.text}) + "\n")

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())
    await provider.aclose()


def engine(open_provider: Callable[[str], Provider]) -> Contestant:
    async def run(url: str, requests: int, in_flight: int, out: IO[str]) -> None:
        class Source:
            number = 0

            def next(self) -> Task | None:
                if self.number == requests:
                    return None
                self.number += 1
                message = Message(role="user", content=f"p{self.number}")
                return Task("asm", "cell", str(self.number), (message,), Sampling(), 1, 0)

        async def store(outcome: Outcome) -> None:
            assert outcome.completion, outcome.error
            out.write(json.dumps({"id": outcome.task.id, "text": outcome.completion.text}) + "\n")

        provider = open_provider(url)
        try:
            await Scheduler([Lane("lane", provider, "mock", in_flight)], {}, Budget(None)).run(Source(), store)
        finally:
            await provider.aclose()

    return run


def measure(contestant: Contestant, url: str, requests: int, in_flight: int) -> tuple[float, float]:
    """(wall, CPU) in seconds; the client's CPU alone."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        asyncio.run(contestant(url, requests, in_flight, out))
        wall_s = time.perf_counter() - start
        out.seek(0)
        assert sum(1 for _ in out) == requests
    after = resource.getrusage(resource.RUSAGE_SELF)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(requests: int = 2000, in_flight: int = 128, rounds: int = 3) -> None:
    os.environ.setdefault("GEMINI_API_KEY", "none")
    contestants: dict[str, Contestant] = {
        "aiohttp": floor,
        "ollama SDK": sdk,
        "hafs ollama": engine(OllamaProvider),
        "hafs gemini": engine(lambda url: GeminiProvider(base_url=url)),
    }
    print(f"{requests} requests, {in_flight} in flight, {LATENCY_S:g} s each: ideal {requests / in_flight * LATENCY_S:.2f} s")
    best: dict[str, tuple[float, float]] = {}
    command = [sys.executable, "-P", str(MOCK), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LAT": str(LATENCY_S)}) as child:
        try:
            assert child.stdout is not None
            url = f"http://127.0.0.1:{int(child.stdout.readline())}"
            for contestant in contestants.values():
                measure(contestant, url, in_flight, in_flight)  # first uses import and compile; that is not the hot path
            for _ in range(rounds):
                for name, contestant in contestants.items():
                    figures = measure(contestant, url, requests, in_flight)
                    best[name] = min(best.get(name, figures), figures)
        finally:
            child.terminate()
    floor_s = best["aiohttp"][0]
    for name, (wall_s, cpu_s) in best.items():
        print(f"{name:12} wall {wall_s:6.2f} s  x{wall_s / floor_s:.2f}  CPU {1000 * cpu_s / requests:.2f} ms a request")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
