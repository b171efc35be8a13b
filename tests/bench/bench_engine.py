"""Whole campaigns beside a bare loop, the bare SDKs and, where they are installed, other tools: wall, CPU a sample, memory.

    python tests/bench/bench_engine.py [SAMPLES] [IN_FLIGHT] [ROUNDS] [NAME …]       (4000 128 5, all)

The server is tests/fakes/mock_models.py with 200 ms latency, in a process of its own. Every contestant is a process of its own as
well and says what it took, imports not counted; they take turns, and the median of the rounds counts. A hafs campaign is the real
one: spec, plan, store with fsync, log and live figures; its domain asks what the bare loops ask (DOMAIN=asm: the real prompts and
verifier of that domain, on a source file of as many facts). PEERS=FOLDER names the folder with a
virtual environment for each script of tests/bench/peers (curator, datadesigner, sdghub); see the README there.
"""

import asyncio
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.bench.mock import Mock

LATENCY_S = 0.2
PEERS = Path(__file__).parent / "peers"
HAFS = {
    "hafs ollama": 'provider = "ollama"\nhost = "URL"\nmodel = "mock:latest"',
    "hafs gemini": 'provider = "gemini"\nbase_url = "URL"\nmodel = "gemini-2.5-flash"',
    "hafs openai": 'provider = "openai"\nbase_url = "URL/v1"\nmodel = "mock:latest"',
}
SPEC = 'name = "bench"\ntarget = {samples}\ndomains = {{ {domain} = 1.0 }}\n[lanes.mock]\nslots = {slots}\n{lane}\n'


# contestants, each in a process of its own -------------------------------------------------------------------------------


async def in_turns(requests: int, in_flight: int, ask: Callable[[int], Awaitable[str]]) -> None:
    """`in_flight` workers; every answer is appended to a file."""
    todo = iter(range(requests))
    with tempfile.TemporaryFile("w") as out:

        async def worker() -> None:
            for number in todo:
                out.write(json.dumps(await ask(number)) + "\n")

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(worker())


async def floor(url: str, requests: int, in_flight: int) -> None:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> str:
            body = {"model": "mock", "messages": [{"role": "user", "content": f"p{number}"}], "stream": False}
            async with session.post(f"{url}/api/chat", json=body) as reply:
                return str((await reply.json())["message"]["content"])

        await in_turns(requests, in_flight, ask)


async def ollama_sdk(url: str, requests: int, in_flight: int) -> None:
    """The SDK over the fast transport, as hafs uses it."""
    import aiohttp
    import ollama
    from httpx_aiohttp import AiohttpTransport

    transport = AiohttpTransport(client=lambda: aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    client = ollama.AsyncClient(host=url, transport=transport, timeout=60)

    async def ask(number: int) -> str:
        reply = await client.chat(model="mock", messages=[{"role": "user", "content": f"p{number}"}])
        return reply.message.content or ""

    await in_turns(requests, in_flight, ask)
    await transport.aclose()


async def gemini_sdk(url: str, requests: int, in_flight: int) -> None:
    """The SDK over the fast transport, as hafs uses it: its own default is slower."""
    import aiohttp
    import httpx
    from google import genai
    from google.genai import types
    from httpx_aiohttp import AiohttpTransport

    transport = AiohttpTransport(client=lambda: aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    async with httpx.AsyncClient(transport=transport, timeout=60) as http:
        options = types.HttpOptions(base_url=url, httpx_async_client=http)
        client = genai.Client(api_key="none", vertexai=False, http_options=options)

        async def ask(number: int) -> str:
            return (await client.aio.models.generate_content(model="gemini-2.5-flash", contents=f"p{number}")).text or ""

        await in_turns(requests, in_flight, ask)


def hafs(name: str, url: str, samples: int, slots: int, domain: str) -> None:
    """A whole campaign in this process."""
    import anyio

    from campaigns.run import run_campaign
    from campaigns.spec import load_campaign
    from config.settings import load_settings
    from tests.fakes import echo_domain

    echo_domain.register()
    with tempfile.TemporaryDirectory() as home:
        os.environ["HAFS_HOME"] = home
        spec = Path(home) / "bench.toml"
        lane = HAFS[name].replace("URL", url)
        if domain == "asm":
            facts = (f"  {word} ${number:04X}\n" for number in range(2**16) for word in ("LDA", "STA"))
            (Path(home) / "facts.asm").write_text("".join(itertools.islice(facts, 2 * samples)))
            lane += '\n[sources]\nasm = ["facts.asm"]'
        spec.write_text(SPEC.format(samples=samples, slots=slots, domain=domain, lane=lane))
        end = anyio.run(run_campaign, load_settings(), load_campaign(spec), spec.parent, lambda _: None, lambda: None)
        assert end.reason == "done" and end.accepted == samples, end


def contest(name: str, url: str, samples: int, in_flight: int) -> None:
    """Run one contestant here and print what it took."""
    bare = {"aiohttp": floor, "ollama SDK": ollama_sdk, "google-genai SDK": gemini_sdk}
    if name in HAFS:
        import campaigns.run  # noqa: F401  (imports do not count)

        start = time.perf_counter()
        cpu_s = time.process_time()
        hafs(name, url, samples, in_flight, os.environ.get("DOMAIN", "echo"))
    else:
        start = time.perf_counter()
        cpu_s = time.process_time()
        asyncio.run(bare[name](url, samples, in_flight))
    figures = [
        time.perf_counter() - start,
        time.process_time() - cpu_s,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    ]
    print("RESULT", json.dumps(figures))


# the round robin ---------------------------------------------------------------------------------------------------------


def run_one(name: str, url: str, samples: int, in_flight: int) -> list[float]:
    """[wall in s, CPU in s, peak memory in MiB] of one contestant."""
    environment = {**os.environ, "GEMINI_API_KEY": "none", "OPENAI_API_KEY": "none"}
    sizes = [str(samples), str(in_flight)]
    if (script := PEERS / f"peer_{name}.py").exists():
        home = Path(os.environ["PEERS"]) / name
        python = home / "bin" / "python"
        for tables in home.glob("lib/*/site-packages/litellm/litellm_core_utils/tokenizers"):
            environment["TIKTOKEN_CACHE_DIR"] = str(tables)  # fetched from the net otherwise
        said = subprocess.run([python, script, url, *sizes], capture_output=True, text=True, check=True, env=environment).stdout
        words = dict(word.split("=") for word in said.split("RESULT")[1].split()[1:])
        return [float(words[key].rstrip("sMB")) for key in ("wall", "cpu", "rss")]
    argv = [sys.executable, "-P", __file__, "--one", name, url, *sizes]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment).stdout
    figures: list[float] = json.loads(said.split("RESULT")[1])
    return figures


def main(samples: int = 4000, in_flight: int = 128, rounds: int = 5, *only: str) -> None:
    peers = [name for name in ("curator", "datadesigner", "sdghub") if "PEERS" in os.environ]
    names = list(only) or ["aiohttp", "ollama SDK", "hafs ollama", "google-genai SDK", "hafs gemini", "hafs openai", *peers]
    print(f"{samples} samples, {in_flight} in flight, {LATENCY_S:g} s each: ideal {samples / in_flight * LATENCY_S:.2f} s")
    seen: dict[str, list[list[float]]] = {name: [] for name in names}
    with Mock(LAT=LATENCY_S, FACT=1) as mock:
        for number in range(rounds):
            for name in names:
                seen[name].append(run_one(name, mock.url, samples, in_flight))
                print(f"round {number + 1} {name}: {seen[name][-1][0]:.2f} s", file=sys.stderr)
    median = {name: [statistics.median(figure) for figure in zip(*runs, strict=True)] for name, runs in seen.items()}
    print(f"{'':18}{'wall':>9}{'floor':>8}{'SDK':>7}{'CPU/sample':>13}{'memory':>10}")
    for name, (wall_s, cpu_s, memory) in median.items():
        sdk = {"hafs ollama": "ollama SDK", "hafs gemini": "google-genai SDK"}.get(name, "")
        against = f"x{wall_s / median[sdk][0]:.2f}" if sdk in median else ""
        base = f"x{wall_s / median['aiohttp'][0]:.2f}" if "aiohttp" in median else ""
        print(f"{name:18}{wall_s:7.2f} s{base:>8}{against:>7}{1000 * cpu_s / samples:10.2f} ms{memory:7.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        contest(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main(*(int(word) for word in sys.argv[1:4]), *sys.argv[4:])
