"""Campaigns against servers with limits: how close to the best possible time, and how little is wasted on the way.

    python tests/bench/bench_limits.py [ROUNDS] [NAME …]       (5, all)

crowded   a server of 32 slots that answers 429 beyond them, 128 wanted, 2,000 samples of 200 ms
swapping  two models on one Ollama host that holds one (PAR=4, QUEUE=32, 2 s a swap), 600 samples, slots not told
hybrid    an Ollama lane (4 at once, 0.8 s) and a Gemini lane (300 a minute, 0.4 s), 600 samples
outage    the same; the Ollama server is killed after 20 s and comes back 15 s later

Each campaign is a process of its own; the servers are tests/fakes/mock_models.py. Medians of the rounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.bench.mock import Mock

HEAD = 'name = "bench"\ntarget = {target}\ndomains = {{ echo = 1.0 }}\n'
HAFS = [sys.executable, "-m", "tests.fakes.echo_domain"]


@dataclass
class Figures:
    """`wall_s` is that of the requests: from the first to the last that the servers saw."""

    wall_s: float
    best_s: float
    notes: dict[str, float]

    def line(self, name: str) -> str:
        notes = ", ".join(f"{key} {value:g}" for key, value in self.notes.items())
        return f"{name:9} {self.wall_s:6.2f} s   x{self.wall_s / self.best_s:.3f} of {self.best_s:.2f} s   {notes}"


def campaign(target: int, lanes: str, home: str) -> subprocess.Popen[str]:
    spec = Path(home) / "bench.toml"
    spec.write_text(HEAD.format(target=target) + lanes)
    command = [*HAFS, "campaign", "start", str(spec)]
    environment = {**os.environ, "HAFS_HOME": home, "GEMINI_API_KEY": "none"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(child: subprocess.Popen[str]) -> None:
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said


def crowded() -> Figures:
    with Mock(LAT=0.2, CAP=32) as mock, tempfile.TemporaryDirectory() as home:
        lanes = f'[lanes.flash]\nprovider = "gemini"\nmodel = "m"\nbase_url = "{mock.url}"\nslots = 128\n'
        child = campaign(2000, lanes, home)
        while not mock.get("/stats").get("n"):
            time.sleep(0.01)
        time.sleep(1.0)
        before = mock.get("/stats")
        finish(child)
        after = mock.get("/stats")
        wasted = (after.get("429", 0) - before.get("429", 0)) / (after["n"] - before["n"])
        return Figures(
            after["span_s"], 2000 / 32 * 0.2, {"429s": after.get("429", 0), "wasted after 1 s %": round(100 * wasted, 2)}
        )


def swapping() -> Figures:
    with Mock(LAT=0.2, PAR=4, SWAP=2, QUEUE=32, MODELS="a,b") as mock, tempfile.TemporaryDirectory() as home:
        lanes = f'[lanes.gpu]\nprovider = "ollama"\nmodels = ["a", "b"]\nhost = "{mock.url}"\n'
        child = campaign(600, lanes, home)
        while not mock.get("/stats").get("n"):
            time.sleep(0.01)
        time.sleep(2.0)
        early = mock.get("/stats").get("503", 0)
        finish(child)
        seen = mock.get("/stats")
        best_s = 600 * 0.2 / 4 + seen["swaps"] * 2
        late = seen.get("503", 0) - early
        return Figures(seen["span_s"], best_s, {"swaps": seen["swaps"], "503s after 2 s": late, "peak": seen["peak"]})


def hybrid(outage: bool = False) -> Figures:
    with (
        Mock(LAT=0.8, PAR=4) as gpu,
        Mock(LAT=0.4, RPM=300) as api,
        tempfile.TemporaryDirectory() as home,
    ):
        lanes = (
            f'[lanes.gpu]\nprovider = "ollama"\nmodel = "mock:latest"\nhost = "{gpu.url}"\nslots = 4\n'
            f'[lanes.flash]\nprovider = "gemini"\nmodel = "m"\nbase_url = "{api.url}"\nrpm = 300\n'
        )
        child = campaign(600, lanes, home)
        while not gpu.get("/stats").get("n"):
            time.sleep(0.01)
        start, notes = time.monotonic(), {}
        if outage:
            time.sleep(20)
            gpu.kill()
            time.sleep(15)
            with Mock(gpu.port, LAT=0.8, PAR=4) as again:
                back = time.monotonic()
                waiter = threading.Thread(target=finish, args=(child,))
                waiter.start()
                while not again.get("/stats").get("n") and waiter.is_alive():
                    time.sleep(0.05)
                notes["first request after it is back, s"] = round(time.monotonic() - back, 1)
                waiter.join()
        else:
            finish(child)
        wall_s = time.monotonic() - start
        notes["over rpm"] = api.get("/stats").get("over_rpm", 0)
        return Figures(wall_s, 60.0, notes)


RUNS: dict[str, Callable[[], Figures]] = {
    "crowded": crowded,
    "swapping": swapping,
    "hybrid": hybrid,
    "outage": lambda: hybrid(outage=True),
}


def main(rounds: int = 5, *names: str) -> None:
    seen: dict[str, list[Figures]] = {name: [] for name in names or RUNS}
    for _ in range(rounds):
        for name, figures in seen.items():
            figures.append(RUNS[name]())
            print(figures[-1].line(name), file=sys.stderr)
    for name, figures in seen.items():
        middle = statistics.median_low(figure.wall_s for figure in figures)
        print(next(figure for figure in figures if figure.wall_s == middle).line(name))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:2]), *sys.argv[2:])
