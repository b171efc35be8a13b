"""Two nodes with addresses of their own: which one a job goes to, what they show to the network, and cables pulled out."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from campaigns.cli.train_live import watch
from campaigns.sync import jobs, push, remote, ssh
from campaigns.sync.remote import Node, connect
from campaigns.sync.seal import seal
from campaigns.sync.ssh import connect_ssh
from campaigns.sync.transport import Transport
from config.contracts.job import JobView
from config.contracts.sample import Provenance, Sample
from config.contracts.wire import RUNTIME, RuntimeArgs
from config.settings import Settings
from tests.fakes.leftovers import end_nodes
from tests.fakes.namespaces import Namespace
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd
from tests.fakes.waiting import wait_for
from tests.integration.test_train_commands import DAEMON, WAITS, Desk, said

pytestmark = [
    pytest.mark.integration,
    *(pytest.mark.needs(tool) for tool in ("sshd", "ssh", "ip", "ss", "tc")),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, for network namespaces"),
]

NAMES = ("box", "attic")
CARD = """
from types import SimpleNamespace
class NVMLError(Exception): value = 0
class NVMLError_NotSupported(NVMLError): pass
NVML_ERROR_NOT_FOUND = NVML_SUCCESS = 0
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(number): return number
def nvmlDeviceGetMemoryInfo(card): return SimpleNamespace(total=24 * 10**9, used=0)
def nvmlDeviceGetUtilizationRates(card): return SimpleNamespace(gpu=0)
def nvmlDeviceGetProcessUtilization(card, since): return []
def nvmlDeviceGetComputeRunningProcesses(card): return []
nvmlDeviceGetGraphicsRunningProcesses = nvmlDeviceGetComputeRunningProcesses
"""


class Network:
    """The laptop's settings and data, and two nodes at the ends of cables. A `card` is put into one by writing its driver."""

    def __init__(self, settings: Settings, folder: Path, opened: ExitStack) -> None:
        self.settings, self.folder = settings, folder
        self.far: dict[str, Namespace] = {}
        self.sshd: dict[str, PrivateSshd] = {}
        for number, name in enumerate(NAMES):
            root = folder / name
            root.mkdir()
            self.far[name] = opened.enter_context(Namespace(number))
            self.sshd[name] = opened.enter_context(self.far[name].sshd(folder / f"{name}-sshd"))
            add_node(settings, self.sshd[name], root, name=name, PYTHONPATH=str(folder / f"{name}-driver"))
            self._serve(name, root, opened)

    def put_card(self, name: str) -> None:
        (self.folder / f"{name}-driver").mkdir()
        (self.folder / f"{name}-driver" / "pynvml.py").write_text(CARD)

    def _serve(self, name: str, root: Path, opened: ExitStack) -> None:
        argv = self.far[name].inside(sys.executable, "-P", str(DAEMON), str(root))
        daemon = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
        opened.callback(daemon.wait)
        opened.callback(daemon.kill)
        wait_for("daemon", lambda: (root / "daemon.log").exists())


@pytest.fixture
def network(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    home.mkdir(exist_ok=True)
    with ExitStack() as opened:
        network = Network(Settings(home=home), tmp_path, opened)
        opened.callback(end_nodes, tmp_path)
        yield network


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds in place of half minutes."""
    for module, name in ((ssh, "STALL_S"), (push, "STALL_S"), (ssh, "CONNECT_S"), (jobs, "ANSWER_S"), (jobs, "WAIT_S")):
        monkeypatch.setattr(module, name, 1.0)
    monkeypatch.setattr(remote, "HANDSHAKE_S", 8.0)


def test_auto_goes_by_the_data_then_by_the_queue_and_before_both_by_the_card(network: Network) -> None:
    desk = Desk(network.settings, network.folder)
    assert "attic has dataset" in said("sync", "push", "tiny", "--node", "attic")
    auto = ("--node", "auto")
    by_data = desk.submit(*WAITS, options=auto)
    assert desk.job(by_data, "attic").path.exists()
    said("sync", "push", "tiny", "--node", "box")
    by_queue = desk.submit(*WAITS, options=auto)
    assert desk.job(by_queue, "box").path.exists()
    desk.submit(*WAITS, options=("--node", "attic"))
    network.put_card("attic")
    by_card = desk.submit(*WAITS, options=auto)
    assert desk.job(by_card, "attic").path.exists()


def test_a_cable_pulled_out_during_a_push(network: Network, impatient: None, tmp_path: Path) -> None:
    chance, path = random.Random(3), tmp_path / "samples.jsonl"
    with path.open("wb") as file:
        for number in range(1500):
            origin = Provenance(campaign="c", task_id="t")
            text = chance.randbytes(2000).hex()
            row = Sample(id=str(number), domain="asm", source_id="s", messages=[], completion=text, provenance=origin)
            file.write(row.model_dump_json().encode() + b"\n")
    sealed = seal([("c", path)], "samples", "set", tmp_path / "sealed")
    network.far["box"].slow_down("16mbit")
    dials: list[str] = []

    def dial() -> Transport:
        dials.append("box")
        return connect_ssh(network.settings, "box")

    results: list[push.PushResult] = []
    arrived: list[int] = []
    with Node("box", dial) as node:
        pushing = threading.Thread(target=lambda: results.append(push.push(node, sealed, lambda done, _: arrived.append(done))))
        pushing.start()
        wait_for("half of it", lambda: arrived and arrived[-1] > 10**6)
        network.far["box"].pull()
        wait_for("that it is noticed", lambda: len(dials) > 1)
        assert pushing.is_alive()
        network.far["box"].plug()
        pushing.join(30)
    assert results and results[0].new and results[0].dataset_id == sealed.manifest.id
    packed = sum(segment.packed_bytes for segment in sealed.manifest.segments)
    assert results[0].sent_bytes < packed + 2**20, "it went on where it stopped"


def test_a_cable_pulled_out_while_a_log_is_followed(
    network: Network, impatient: None, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    desk = Desk(network.settings, network.folder)
    id_ = desk.submit(*WAITS)
    log, shown, ended = desk.job(id_, "box").log_file(1), list[bytes](), list[JobView]()
    wait_for("its first line", lambda: log.exists() and b"it begins" in log.read_bytes())
    following = threading.Thread(target=lambda: ended.append(watch(network.settings, "box", id_, shown.append)))
    following.start()
    wait_for("its first line here", lambda: b"it begins" in b"".join(shown))
    network.far["box"].pull()
    with log.open("ab") as file:
        file.write(b"nobody sees this now\n")
    said_so = ""

    def unknown() -> bool:
        nonlocal said_so
        said_so += capfd.readouterr().err
        return "box does not answer: unknown since " in said_so

    wait_for("that it is noticed", unknown)
    network.far["box"].plug()
    wait_for("what was missed", lambda: b"nobody sees this now" in b"".join(shown))
    desk.let_go(id_, "box")
    following.join(30)
    assert ended and ended[0].state == "SUCCEEDED" and b"".join(shown) == log.read_bytes()


def test_nothing_of_ours_is_open_to_the_network(network: Network) -> None:
    with connect(network.settings, "box") as node:
        far, port = network.far["box"], network.sshd["box"].port
        assert [line.split(" ")[0] for line in far.listening()] == [f"{far.address}:{port}"]
        runtime = node.call(RUNTIME, RuntimeArgs())
        assert runtime.embedded
        assert sorted(line.split(" ")[0] for line in far.listening()) == sorted(
            [f"{far.address}:{port}", runtime.url.removeprefix("http://")]
        )
        assert runtime.url.startswith("http://127.0.0.1:")
