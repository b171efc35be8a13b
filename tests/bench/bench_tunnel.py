"""A node's model server through the SSH connection, against the same server asked directly.

    python tests/bench/bench_tunnel.py [ROUNDS] [LATENCY_S …]       (5; 0.5, 0.2, 0.05)

32 requests in flight, Ollama's chat API with answers of 50 words, by the provider that campaigns use; the server is
tests/fakes/mock_models.py, the way a real sshd on loopback. Direct and tunnelled runs take turns; medians of requests a second.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parents[2]))
from agents.providers.ollama import OllamaProvider
from agents.task import Sampling
from campaigns.serving import model_server
from config.contracts.sample import Message
from config.settings import Settings
from tests.bench.mock import Mock
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd

IN_FLIGHT = 32
SECONDS = 5.0  # of requests a run, about


async def rate(url: str, requests: int) -> float:
    """Requests a second, connections made before."""
    provider = OllamaProvider(url)
    sampling = Sampling(temperature=0, top_p=1, max_tokens=96, num_ctx=2048)
    left = requests

    async def worker(number: int) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            prompt = f"{number} {left} " + "LDA #$10 STA $2100 " * 20
            answer = await provider.generate("mock:latest", [Message(role="user", content=prompt)], sampling)
            assert answer.finish_reason == "stop"

    async def all_at_once() -> None:
        async with anyio.create_task_group() as group:
            for number in range(IN_FLIGHT):
                group.start_soon(worker, number)

    try:
        await all_at_once()
        left = requests
        begin = time.perf_counter()
        await all_at_once()
        return requests / (time.perf_counter() - begin)
    finally:
        await provider.aclose()


def compare(latency_s: float, rounds: int) -> None:
    requests = int(min(SECONDS * IN_FLIGHT / latency_s, 4000))
    with tempfile.TemporaryDirectory() as folder, Mock(LAT=latency_s) as mock, PrivateSshd(Path(folder) / "sshd") as sshd:
        settings = Settings(home=Path(folder) / "home")
        add_node(settings, sshd, Path(folder) / "node", OLLAMA_HOST=mock.url)
        direct, tunnelled = [], []
        with model_server(settings, "box") as server:
            for _ in range(rounds):
                direct.append(anyio.run(rate, mock.url, requests))
                tunnelled.append(anyio.run(rate, server.url, requests))
    near, far = statistics.median(direct), statistics.median(tunnelled)
    print(f"{latency_s:5.2f} s an answer: direct {near:7.1f}/s, through SSH {far:7.1f}/s, x{far / near:.3f}")


def main(rounds: int = 5, *latencies: float) -> None:
    os.environ.pop("SSH_AUTH_SOCK", None)
    for latency_s in latencies or (0.5, 0.2, 0.05):
        compare(latency_s, rounds)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:2]), *(float(word) for word in sys.argv[2:]))
