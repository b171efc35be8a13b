"""A push through a link that breaks once: at seeded bytes, between any two messages, in the middle of one, or by falling silent.

Each time the push goes on by itself, the node shows nothing that is not verified, and the dataset is the right one. HAFS_CUTS=all
runs them all; without it a seeded tenth of them.
"""

import hashlib
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from campaigns.sync import push as push_module
from campaigns.sync import sealed_before, ssh
from campaigns.sync.push import push
from campaigns.sync.remote import connect, node_named
from campaigns.sync.seal import SealedDataset, seal
from config.contracts.sample import Provenance, Sample
from config.errors import DiskFull
from config.settings import Settings
from tests.fakes.faulty_link import Fault, FaultyLink
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd

pytestmark = [pytest.mark.integration, pytest.mark.needs("sshd"), pytest.mark.needs("ssh")]
ALL = os.environ.get("HAFS_CUTS") == "all"
CUTS, TRUNCATIONS, STALLS = 180, 15, 5
NOTICED_S = 20.0


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSshd]:
    with PrivateSshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SealedDataset:
    """Six segments of about 100 kB, packed."""
    monkeypatch.setattr(sealed_before, "SEGMENT_BYTES", 200_000)
    chance = random.Random(0)
    path = tmp_path / "samples.jsonl"
    with path.open("wb") as file:
        for number in range(260):
            made = Provenance(campaign="c", task_id="t")
            text = chance.randbytes(2000).hex()
            row = Sample(id=str(number), domain="asm", source_id="s", messages=[], completion=text, provenance=made)
            file.write(row.model_dump_json().encode() + b"\n")
    return seal([("c", path)], "samples", "set", tmp_path / "sealed")


class Node:
    """A root that is watched: whatever is visible in it at any moment has to be right."""

    def __init__(self, sshd: PrivateSshd, home: Path, root: Path) -> None:
        self._sshd, self._home, self.root = sshd, home, root
        self.wrong: list[str] = []
        self._right: set[str] = set()

    def push(self, sealed: SealedDataset, fault: Fault | None) -> FaultyLink:
        shutil.rmtree(self._home, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)
        self._right.clear()
        settings = Settings(home=self._home)
        with FaultyLink(self._sshd.port, fault) as link, self._watched():
            add_node(settings, self._sshd, self.root, port=link.port)
            with node_named(settings, "box") as node:
                result = push(node, sealed, lambda done, total: None)
        assert result.dataset_id == sealed.manifest.id and not self.wrong, (fault, self.wrong)
        assert {path.name for path in self.segments()} == {file.name for file in sealed.files}
        assert (self.root / "datasets" / f"{sealed.manifest.id}.json").exists()
        return link

    def segments(self) -> list[Path]:
        return list((self.root / "segments").glob("*"))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                self._look()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self._look()

    def _look(self) -> None:
        datasets = list((self.root / "datasets").glob("*.json"))
        for path in self.segments():
            if path.name not in self._right:
                if f"{hashlib.sha256(path.read_bytes()).hexdigest()}.jsonl.zst" != path.name:
                    self.wrong.append(path.name)
                self._right.add(path.name)
        if datasets and len(self.segments()) < 6:
            self.wrong.append("a dataset without its segments")


@pytest.fixture
def node(sshd: PrivateSshd, home: Path, tmp_path: Path) -> Node:
    return Node(sshd, home, tmp_path / "node")


def share(faults: list[Fault]) -> list[Fault]:
    return faults if ALL else random.Random(7).sample(faults, max(1, len(faults) // 10))


def anywhere(chance: random.Random, link: FaultyLink) -> tuple[bool, int]:
    up = chance.random() < 0.8
    return up, chance.randrange(1, link.passed[up])


@pytest.mark.timeout(3600 if ALL else 120)
def test_a_push_goes_on_after_every_cut(node: Node, sealed: SealedDataset) -> None:
    clean = node.push(sealed, None)
    chance = random.Random(1)
    cuts = [Fault("cut", up, after) for up, after in dict.fromkeys(clean.turns) if after]
    cuts += [Fault("cut", *anywhere(chance, clean)) for _ in range(CUTS - len(cuts))]
    truncations = [Fault("truncate", *anywhere(chance, clean)) for _ in range(TRUNCATIONS)]
    for fault in [*share(cuts), *share(truncations)]:
        link = node.push(sealed, fault)
        assert link.struck.is_set() and link.connections >= 2, fault


@pytest.mark.timeout(600 if ALL else 120)
def test_a_silent_link_is_noticed(node: Node, sealed: SealedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ALL:  # the whole length is waited for in the long run
        for module in (ssh, push_module):
            monkeypatch.setattr(module, "STALL_S", 3.0)
    clean = node.push(sealed, None)
    chance = random.Random(2)
    for fault in share(
        [Fault("stall", True, chance.randrange(clean.passed[True] // 4, clean.passed[True])) for _ in range(STALLS)]
    ):
        begin = time.monotonic()
        link = node.push(sealed, fault)
        assert link.struck.is_set() and link.connections >= 2, fault
        assert time.monotonic() - begin < NOTICED_S + 10  # a clean push needs the rest at most


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_of_the_node_is_told_and_the_next_push_goes_on(
    sshd: PrivateSshd, home: Path, small_disk: Path, sealed: SealedDataset
) -> None:
    settings = Settings(home=home)
    add_node(settings, sshd, small_disk / "node")
    with connect(settings, "box") as node, pytest.raises(DiskFull, match="box: no space left") as full:
        push(node, sealed, lambda done, total: None)
    assert "free some space" in full.value.hint
    assert not list((small_disk / "node" / "datasets").glob("*.json"))
    subprocess.run(["mount", "-o", "remount,size=3m", str(small_disk)], check=True)
    with connect(settings, "box") as node:
        result = push(node, sealed, lambda done, total: None)
    assert result.new and result.skipped_bytes > 0
