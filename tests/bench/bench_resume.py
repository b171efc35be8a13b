"""How long a campaign of many rows takes from the start of its process to its first request, and how much memory.

    python tests/bench/bench_resume.py [ROWS] [ROUNDS]       (1000000 3)

It makes a campaign of ROWS samples of 1.5 kB (and a tenth as many rejected ones), then starts `hafs campaign start` on it
without the index, with it, and after a person has taken a row out (without the index: all ids are read). The page cache is warm.
The server is a small one on loopback that notes when the first prompt comes. The peak memory is told by Linux alone.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from campaigns.domains.registry import domain
from campaigns.index import INDEX
from campaigns.store import Call, CampaignFiles, Rejected
from config.contracts.sample import Message, Provenance, Sample
from config.settings import Settings

SPEC = """
name = "many"
target = {target}
domains = {{ asm = 1.0 }}

[lanes.teacher]
provider = "ollama"
host = "{url}"
model = "teacher"
slots = 8
"""


class Server(ThreadingHTTPServer):
    """Notes when the first prompt comes; it never answers one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.first = threading.Event()
        self.at = 0.0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        model = {"name": "teacher:latest", "model": "teacher:latest", "modified_at": "2026-01-01T00:00:00Z", "size": 1}
        body = json.dumps({"version": "0.34.1", "models": [{**model, "digest": "0" * 64, "details": {}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.at = self.server.at or time.perf_counter()
        self.server.first.set()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the table is the output."""


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def make(files: CampaignFiles, rows: int) -> None:
    """Write the rows and calls of a campaign: filled from a template, since a million models would take minutes."""
    cells = domain("asm").cells([])
    files.path.mkdir(parents=True)
    sample, rejected, accepted_call, rejected_call = _templates()
    with open(files.samples, "w") as samples, open(files.rejected, "w") as refused, open(files.calls, "w") as calls:
        for number in range(rows + rows // 10):
            accepted = number % 11 != 10
            digest = hashlib.sha256(str(number).encode()).hexdigest()
            own = {"ID": digest, "ANSWER": digest[:16], "CELL": cells[number % len(cells)], "99887766": str(number // len(cells))}
            (samples if accepted else refused).write(_filled(sample if accepted else rejected, own))
            calls.write(_filled(accepted_call if accepted else rejected_call, own))


def _templates() -> tuple[str, str, str, str]:
    """A sample, a rejected row and their calls, with words in the places that differ."""
    lane = {"provider": "ollama", "model": "teacher:latest", "lane": "teacher"}
    made = Provenance.model_validate({"campaign": "many", "task_id": "ID", "cell": "CELL", "number": 99887766, **lane})
    asked = [Message(role="user", content="q" * 900)]
    row = {"id": "ID", "domain": "asm", "source_id": "s", "messages": asked, "completion": "c" * 120, "provenance": made}
    call = {"task_id": "ID", "domain": "asm", "cell": "CELL", "number": 99887766, **lane}
    used = {"prompt_tokens": 312, "completion_tokens": 24, "latency_s": 0.8123, "time": 1763720000.123}
    return (
        Sample.model_validate(row).model_dump_json(),
        Rejected.model_validate({**row, "reason": "flags"}).model_dump_json(),
        Call.model_validate({**call, **used, "verdict": "accepted", "answer": "ANSWER"}).model_dump_json(),
        Call.model_validate({**call, **used, "verdict": "rejected", "reason": "flags"}).model_dump_json(),
    )


def _filled(template: str, words: dict[str, str]) -> str:
    for word, text in words.items():
        template = template.replace(word, text)
    return template + "\n"


def measure(hafs: list[str], spec: Path, target: int) -> tuple[float, float]:
    """Seconds from the start of the process to its first request, and its peak memory in MB by then."""
    with serving() as server:
        spec.write_text(SPEC.format(target=target, url=f"http://127.0.0.1:{server.server_port}"))
        start = time.perf_counter()
        child = subprocess.Popen([*hafs, "start", str(spec)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            if not server.first.wait(120):
                child.kill()
                raise SystemExit(f"no request within 120 s: {child.communicate()[0]}")
            return server.at - start, _peak_mb(child.pid)
        finally:
            child.kill()
            child.communicate()


def _peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), float("nan"))


def status_s(hafs: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([*hafs, "status", "many", "--json"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main(rows: int = 1_000_000, rounds: int = 3) -> None:
    hafs = [sys.executable, "-P", "-m", "campaigns.cli.main", "campaign"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HAFS_HOME"] = folder
        files, spec = CampaignFiles(Settings(home=Path(folder)), "many"), Path(folder) / "many.toml"
        make(files, rows)
        size = files.samples.stat().st_size / rows
        print(f"{rows} samples of {size:.0f} bytes, {rows // 10} rejected; {os.cpu_count()} cores")
        index = files.path / INDEX

        def row(name: str, rounds: int, *, indexed: bool) -> None:
            figures = []
            for _ in range(rounds):
                if not indexed:
                    index.unlink(missing_ok=True)
                figures.append(measure(hafs, spec, 2 * rows))
            _print(name, figures)

        row("without its index", rounds, indexed=False)
        row("with its index", rounds, indexed=True)
        print(f"hafs campaign status: {status_s(hafs):.2f} s with the index", end="")
        index.unlink()
        print(f", {status_s(hafs):.2f} s without")
        files.samples.write_bytes(files.samples.read_bytes().split(b"\n", 1)[1])
        row("a row was taken out", 1, indexed=False)


def _print(name: str, figures: list[tuple[float, float]]) -> None:
    seconds, peak = [each for each, _ in figures], max(memory for _, memory in figures)
    span = f"({min(seconds):.2f} to {max(seconds):.2f})"
    print(f"{name:20} first request after {statistics.median(seconds):5.2f} s {span}, {peak:.0f} MB")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
