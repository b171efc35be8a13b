"""Submits over a real sshd: lost answers make no second job, and who comes at once gets a turn in order."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from campaigns.sync import jobs
from campaigns.sync.jobs import Order
from campaigns.sync.remote import connect
from config.contracts.job import JobSpec, JobState, JobView
from config.locks import FileLock
from config.settings import Settings
from tests.fakes.fake_processes import FakeProcesses
from tests.fakes.node_dataset import put_dataset
from tests.fakes.relay import Relay
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd
from trainer_node.daemon import Daemon, lock_file
from trainer_node.queue import Queue

pytestmark = [pytest.mark.integration, pytest.mark.needs("sshd")]

SPEC = JobSpec(kind="sft", name="coder", base="x", data=["d"])


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSshd]:
    with PrivateSshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A node whose daemon is this test."""
    path = tmp_path / "node"
    lock = FileLock(lock_file(path))
    assert lock.acquire()
    lock.sign()
    yield path
    lock.release()


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


def laptop(tmp_path: Path, sshd: PrivateSshd, root: Path, name: str = "one", port: int = 0, **environment: str) -> Settings:
    settings = Settings(home=tmp_path / name)
    add_node(settings, sshd, root, port=port, **environment)
    return settings


def test_an_answer_lost_on_the_way_makes_no_second_job(tmp_path: Path, sshd: PrivateSshd, root: Path) -> None:
    dataset = put_dataset(root, b'{"id": "a"}\n')
    with Relay(sshd.port) as relay:
        settings = laptop(tmp_path, sshd, root, port=relay.port)
        with connect(settings, "box") as node:
            relay.cut_at_answer()
            result = jobs.submit(settings, node, SPEC, dataset)
            [record] = jobs.records(settings)
            again = jobs.send(settings, node, record)
        assert relay.connections == 2
    assert not result.new, "the node had it from the first time"
    assert again.job.id == result.job.id == record.job_id
    with closing(Queue(root)) as queue:
        assert [job.id for job in queue.all()] == [result.job.id]


@pytest.mark.parametrize("point", ["commit.submit.before", "commit.submit.after"])
def test_a_node_that_dies_over_a_submit_has_one_job(tmp_path: Path, sshd: PrivateSshd, root: Path, point: str) -> None:
    dataset = put_dataset(root, b'{"id": "a"}\n')
    settings = laptop(tmp_path, sshd, root, HAFS_KILL_AT=f"{point}@1@{tmp_path}/latch")
    with connect(settings, "box") as node:
        result = jobs.submit(settings, node, SPEC, dataset)
    assert (tmp_path / "latch.1").exists() and result.new == point.endswith("before")
    with closing(Queue(root)) as queue:
        assert [job.id for job in queue.all()] == [result.job.id]


def test_thirty_jobs_of_three_laptops_run_in_order(tmp_path: Path, sshd: PrivateSshd, root: Path) -> None:
    dataset = put_dataset(root, b'{"id": "a"}\n')

    def submit_ten(name: str) -> list[JobView]:
        chance, settings = random.Random(name), laptop(tmp_path, sshd, root, name)
        with connect(settings, "box") as node:
            orders = [Order(priority=chance.choice([0, 0, 0, 5, -5])) for _ in range(10)]
            return [jobs.submit(settings, node, SPEC, dataset, order).job for order in orders]

    with ThreadPoolExecutor(3) as laptops:
        submitted = [job for ten in laptops.map(submit_ten, ("one", "two", "three")) for job in ten]
    with closing(Queue(root)) as queue:
        run_all(queue, root)
        ended = queue.all()
        begun = [event.job for event in queue.events() if event.state is JobState.PREPARING]
    assert {job.id for job in ended} == {job.id for job in submitted} and len(submitted) == 30
    assert {job.state for job in ended} == {JobState.SUCCEEDED}
    assert begun == [job.id for job in sorted(submitted, key=lambda job: (-job.priority, job.id))]


def run_all(queue: Queue, root: Path) -> None:
    processes = FakeProcesses()
    daemon = Daemon(root, processes=processes)
    while daemon.step(queue):
        for runner in processes.living():
            runner.begin()
            runner.end("success")
