"""How long `hafs sync push` takes over ssh, against `rsync -az` of the same file.

    python tests/bench/bench_sync.py [MIB] [ROUNDS]       (1024 5)

It makes a campaign of MIB mebibytes of rows whose text `zstd -3` leaves at 25 to 40 %, and takes turns: rsync and push of all of
it, a push of what was sealed before, and both again after 1 MiB was appended. All over a private sshd on loopback; then, as root
where the kernel has network namespaces, over a link of 100 Mbit/s (`tc tbf` on a veth pair) and a relay that delays 20 ms each
way. Both are whole commands, with the start of their processes. Before each one, what is dirty is written to the disk.
"""

import hashlib
import os
import queue
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import zstandard

from campaigns.sync.hostkeys import HostKey
from campaigns.sync.ssh import trust
from config.contracts.sample import Message, Provenance, Sample
from config.settings import Settings
from tests.fakes.sshd import PrivateSshd, sshd_path

HAFS, NODE = (str(Path(sys.executable).parent / name) for name in ("hafs", "hafs-node"))
MIB = 2**20
SYSTEM = "You answer questions about 65816 assembly exactly."
DELAY_S = 0.02
RATE = "100mbit"
SPACE, NEAR, FAR = "hafs-far", "10.77.0.1", "10.77.0.2"


def main() -> None:
    if sys.argv[1:2] == ["--relay"]:
        return relay(int(sys.argv[2]), int(sys.argv[3]))
    mib, rounds = (int(text) for text in (*sys.argv[1:3], *("1024", "5")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory(prefix="hafs-bench-") as name:
        bench = Bench(Path(name))
        rows = write_rows(bench.samples, mib * MIB)
        share = packed_share(bench.samples)
        print(f"{bench.samples.stat().st_size / MIB:.0f} MiB, {rows} rows; zstd -3 leaves {share:.1%}", flush=True)
        print(f"\n| {'':28} | rsync -az | hafs sync push | ratio | on the wire | peak memory |\n|{' --- |' * 6}", flush=True)
        with PrivateSshd(bench.folder / "sshd") as sshd:
            bench.use(sshd, "127.0.0.1", sshd.port)
            bench.compare_all(rounds)
            if os.geteuid() == 0 and shutil.which("tc"):
                with slow_link(sshd.folder, sshd.port) as port:
                    bench.use(sshd, FAR, port)
                    bench.compare("100 Mbit/s, 20 ms each way", [bench.pair_fresh() for _ in range(rounds)])


class Bench:
    """One campaign, one node, one place for rsync; `use` says by which way they are reached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(home=folder / "home")
        self.samples = self.settings.training / "bench" / "samples.jsonl"
        self.samples.parent.mkdir(parents=True)
        self.node, self.target = folder / "node", folder / "target"

    def use(self, sshd: PrivateSshd, host: str, port: int) -> None:
        values = {"host": host, "user": sshd.user, "identity": sshd.identity, "command": NODE, "root": self.node}
        lines = ["[nodes.box]", f"port = {port}", *(f'{key} = "{value}"' for key, value in values.items())]
        self.settings.nodes_file.write_text("\n".join([*lines, ""]))
        kind, base64 = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
        trust(self.settings, "box", HostKey(f"[{host}]:{port}", kind, base64))
        ssh = f"ssh -q -p {port} -i {sshd.identity} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        self.rsync_argv = ["rsync", "-az", "-e", ssh, str(self.samples), f"{sshd.user}@{host}:{self.target}/"]

    def compare_all(self, rounds: int) -> None:
        fresh, again, appended = [], [], []
        for _ in range(rounds):
            pair = self.pair_fresh()
            fresh.append(pair)
            remove(self.node)
            again.append((pair[0], *self.push()))
            appended.append(self.pair_appended())
        self.compare("all, with sealing", fresh)
        self.compare("all, sealed before", again)
        self.compare("1 MiB appended", appended)

    def pair_fresh(self) -> "Pair":
        remove(self.target, self.node, self.settings.segments)
        self.target.mkdir()
        return (self.rsync(), *self.push())

    def pair_appended(self) -> "Pair":
        before = self.samples.stat().st_size
        write_rows(self.samples, MIB, first=10**9)
        try:
            return (self.rsync(), *self.push())
        finally:
            os.truncate(self.samples, before)

    def rsync(self) -> float:
        os.sync()
        begin = time.perf_counter()
        subprocess.run(self.rsync_argv, check=True)
        return time.perf_counter() - begin

    def push(self) -> tuple[float, float, float]:
        """Seconds, MiB on the wire, MiB of peak memory."""
        before = self.stored()
        os.sync()
        begin = time.perf_counter()
        environment = {**os.environ, "HAFS_HOME": str(self.settings.home)}
        process = subprocess.Popen([HAFS, "sync", "push", "bench", "--node", "box"], env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"hafs sync push ended with {process.returncode}")
        return seconds, (self.stored() - before) / MIB, used.ru_maxrss / 1024

    def stored(self) -> int:
        return sum(path.stat().st_size for path in (self.node / "segments").glob("*"))

    def compare(self, what: str, pairs: "list[Pair]") -> None:
        theirs, ours, wire, memory = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(f"| {what:28} | {theirs:.2f} s | {ours:.2f} s | {ratio:.2f} | {wire:.2f} MiB | {memory:.0f} MiB |", flush=True)


Pair = tuple[float, float, float, float]  # seconds of rsync, seconds of hafs, MiB on the wire, MiB of memory


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def write_rows(path: Path, size: int, first: int = 0) -> int:
    """Append rows as a campaign writes them until `size` bytes are there: words by Zipf's law. Returns how many."""
    chance, dice = random.Random(first), np.random.default_rng(first)
    words = ["".join(chance.choices("etaoinshrdlucmfwygpbvk", k=chance.randint(2, 9))) + " " for _ in range(12_000)]
    shares = np.cumsum(1 / np.arange(1, len(words) + 1))
    written = number = 0
    with path.open("ab") as file:
        while written < size:
            drawn = np.searchsorted(shares, dice.random(200) * shares[-1]).tolist()
            text = "".join(map(words.__getitem__, drawn[: chance.randint(90, 200)]))
            line = row(first + number, text).model_dump_json().encode() + b"\n"
            written += file.write(line)
            number += 1
    return number


def row(number: int, text: str) -> Sample:
    id_ = hashlib.sha256(str(number).encode()).hexdigest()
    question = f"What does {text[:60]} do, and which flags does it change?"
    return Sample(
        id=id_,
        domain="asm",
        source_id=f"op-{number % 9973}",
        messages=[Message(role="system", content=SYSTEM), Message(role="user", content=question)],
        completion=text,
        proof={"flags": "nz", "cycles": number % 7},
        provenance=Provenance(
            campaign="bench",
            task_id=id_,
            cell=f"flags/{number % 211}",
            number=number,
            provider="ollama",
            model="teacher",
            lane="box",
            prompt_sha256=hashlib.sha256(question.encode()).hexdigest(),
            prompt_tokens=61,
            completion_tokens=len(text) // 5,
            created_at=1.7637e9 + number * 0.11,
        ),
    )


def packed_share(path: Path) -> float:
    packed = 0
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    with path.open("rb") as file:
        while piece := file.read(MIB):
            packed += len(packer.compress(piece))
    return (packed + len(packer.flush())) / path.stat().st_size


@contextmanager
def slow_link(folder: Path, target: int) -> Iterator[int]:
    """A namespace of its own with an sshd of the same keys; the port at FAR by which a delaying relay leads to it."""

    def run(*argv: str) -> None:
        subprocess.run(argv, check=True)

    def inside(*argv: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", SPACE, *argv], stderr=subprocess.DEVNULL)

    with ExitStack() as undo:
        run("ip", "netns", "add", SPACE)
        undo.callback(run, "ip", "netns", "delete", SPACE)
        run("ip", "link", "add", "hafs0", "type", "veth", "peer", "name", "hafs1", "netns", SPACE)
        run("ip", "addr", "add", f"{NEAR}/30", "dev", "hafs0")
        run("ip", "link", "set", "hafs0", "up")
        for argv in (f"addr add {FAR}/30 dev hafs1", "link set hafs1 up", "link set lo up"):
            run("ip", "-n", SPACE, *argv.split())
        shape = f"root tbf rate {RATE} burst 64kb latency 50ms".split()
        run("tc", "qdisc", "add", "dev", "hafs0", *shape)
        run("tc", "-n", SPACE, "qdisc", "add", "dev", "hafs1", *shape)
        for process in (
            inside(sshd_path(), "-D", "-f", str(folder / "sshd_config")),
            inside(sys.executable, __file__, "--relay", "2222", str(target)),
        ):
            undo.callback(process.wait)
            undo.callback(process.terminate)
        end = time.monotonic() + 15
        while True:
            try:
                with socket.create_connection((FAR, 2222), timeout=1) as sock:
                    sock.recv(1)  # sshd's banner
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield 2222


def relay(port: int, target: int) -> None:
    """Pass connections on; every byte arrives DELAY_S later."""
    with socket.create_server((FAR, port)) as listener:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", target))
            for source, sink in ((near, far), (far, near)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                later: queue.Queue[tuple[float, bytes]] = queue.Queue(256)
                threading.Thread(target=take, args=(source, later), daemon=True).start()
                threading.Thread(target=give, args=(sink, later), daemon=True).start()


def take(source: socket.socket, later: "queue.Queue[tuple[float, bytes]]") -> None:
    data = b"begin"
    while data:
        try:
            data = source.recv(65536)
        except OSError:
            data = b""
        later.put((time.monotonic() + DELAY_S, data))


def give(sink: socket.socket, later: "queue.Queue[tuple[float, bytes]]") -> None:
    while True:
        due, data = later.get()
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            if not data:
                return sink.shutdown(socket.SHUT_WR)
            sink.sendall(data)
        except OSError:  # the other side has gone
            return


if __name__ == "__main__":
    main()
