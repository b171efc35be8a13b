"""A node under the jobs of three laptops at once, over a real sshd on loopback.

    python tests/bench/bench_node.py [JOBS] [ROUNDS]       (30; 9)

Three laptops submit ten jobs each, with mixed priorities, while another one asks for the status over an open session; then the
jobs run, one after the other, with the real daemon, runners and a scripted pipeline. Printed: submits, requests for the status
while all that goes on, the order in which the jobs began, and `hafs train status` from the shell with its parts, of which some
overlap: the command's own start, the login, a shell of the account (which has no start-up files), the start of `hafs-node rpc`
to its first answer, and one more answer.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from campaigns.sync import jobs
from campaigns.sync.jobs import Order
from campaigns.sync.remote import Node, connect
from campaigns.sync.ssh import open_shell
from config.contracts.job import JobSpec, JobState, JobView
from config.contracts.wire import STATUS, JobArgs
from config.settings import Settings
from tests.fakes.leftovers import end_nodes
from tests.fakes.node_dataset import put_dataset
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd
from trainer_node.daemon import daemon_pid
from trainer_node.queue import Queue

DAEMON = Path(__file__).parents[1] / "fakes" / "daemon.py"
LAPTOPS = ("one", "two", "three")
DEADLINE_S = 600.0


def a_spec(steps: list[str]) -> JobSpec:
    return JobSpec(kind="sft", name="coder", base="x", data=["d"], system=json.dumps({"*": steps}))


def laptop(folder: Path, sshd: PrivateSshd, name: str) -> Settings:
    settings = Settings(home=folder / name)
    add_node(settings, sshd, folder / "node")
    return settings


def submit_some(settings: Settings, dataset: str, count: int) -> list[tuple[JobView, float]]:
    """The jobs with the seconds that each submit took."""
    chance, done = random.Random(settings.home.name), []
    with connect(settings, "box") as node:
        for _ in range(count):
            begin = time.perf_counter()
            order = Order(priority=chance.choice([0, 0, 0, 5, -5]))
            job = jobs.submit(settings, node, a_spec(["stage RUNNING", "grow", "succeed"]), dataset, order).job
            done.append((job, time.perf_counter() - begin))
    return done


def ask_until(node: Node, over: Callable[[list[JobView]], bool]) -> list[float]:
    """Ask for all jobs, 20 times a second, until it is over; the seconds that each answer took."""
    times: list[float] = []
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        begin = time.perf_counter()
        found = node.call(STATUS, JobArgs()).jobs
        times.append(time.perf_counter() - begin)
        if over(found):
            return times
        time.sleep(0.05)
    raise TimeoutError("the jobs do not end")


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def told(what: str, times: list[float]) -> None:
    middle, high = 1000 * statistics.median(times), 1000 * percentile(times, 0.95)
    print(f"{what:<44} {len(times):>5} x   median {middle:7.1f} ms   p95 {high:7.1f} ms   max {1000 * max(times):7.1f} ms")


def parts(settings: Settings, rounds: int) -> None:
    """What `hafs train status` waits for, each by itself."""
    times: dict[str, list[float]] = {
        name: [] for name in ("log in", "a shell there", "hafs-node, to its first answer", "an answer")
    }
    for _ in range(rounds):
        begin = time.perf_counter()
        with open_shell(settings, "box") as there:
            logged_in = time.perf_counter()
            there.run("true", b"", lambda line: None, 60)
            ran = time.perf_counter()
        before = time.perf_counter()
        with connect(settings, "box") as node:
            connected = time.perf_counter()
            node.call(STATUS, JobArgs())
            answered = time.perf_counter()
        found = (logged_in - begin, ran - logged_in, connected - before - (ran - begin), answered - connected)
        for name, took in zip(times, found, strict=True):
            times[name].append(took)
    told("hafs --help", shell(settings, rounds, "--help"))
    for name, each in times.items():
        told(f"  {name}", each)


def shell(settings: Settings, rounds: int, *words: str) -> list[float]:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        argv = [sys.executable, "-P", "-m", "campaigns.cli.main", *words]
        subprocess.run(argv, env={**os.environ, "HAFS_HOME": str(settings.home)}, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return times


def run(folder: Path, sshd: PrivateSshd, count: int, rounds: int) -> None:
    root = folder / "node"
    dataset = put_dataset(root, b'{"id": "a"}\n')
    homes = [laptop(folder, sshd, name) for name in LAPTOPS]
    daemon = subprocess.Popen([sys.executable, "-P", str(DAEMON), str(root)], start_new_session=True)
    while daemon_pid(root) != daemon.pid:
        time.sleep(0.02)
    with connect(homes[0], "box") as watcher, ThreadPoolExecutor(3) as pool:
        gate = jobs.submit(homes[0], watcher, a_spec(["await go", "succeed"]), dataset).job  # the others queue up behind it
        tens = [pool.submit(submit_some, home, dataset, count // 3) for home in homes]
        while_coming = ask_until(watcher, lambda _: all(ten.done() for ten in tens))
        done = [pair for ten in tens for pair in ten.result()]
        (root / "jobs" / gate.id / "go").touch()
        begin = time.perf_counter()
        while_running = ask_until(watcher, lambda found: all(job.state.ended for job in found))
        seconds = time.perf_counter() - begin
        told("submit, three laptops at once", [took for _, took in done])
        told("status on an open session, while they come in", while_coming)
        told("status on an open session, while they run", while_running)
    with closing(Queue(root)) as queue:
        begun = [event.job for event in queue.events() if event.state is JobState.PREPARING][1:]
        states = {job.state for job in queue.all()}
    expected = [job.id for job in sorted((job for job, _ in done), key=lambda job: (-job.priority, job.id))]
    print(f"{len(begun)} jobs in {seconds:.1f} s; ended as {', '.join(states)}; in order: {begun == expected}")
    told("hafs train status, over ssh", shell(homes[1], rounds, "train", "status", "--node", "box"))
    parts(homes[1], rounds)
    told("hafs train status, this machine", shell(homes[1], rounds, "train", "status", "--node", "local"))
    daemon.terminate()
    daemon.wait()


def main() -> None:
    count, rounds = [int(word) for word in sys.argv[1:]] + [30, 9][len(sys.argv) - 1 :]
    os.environ.pop("SSH_AUTH_SOCK", None)
    with tempfile.TemporaryDirectory(prefix="bench-node-") as name, PrivateSshd(Path(name) / "sshd", HOME=name) as sshd:
        try:
            run(Path(name), sshd, count, rounds)
        finally:
            end_nodes(Path(name))


if __name__ == "__main__":
    main()
