"""A push that follows a campaign: it sends what is new, outlasts a lost node, and ends with the campaign."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue

import pytest

from campaigns.store import CampaignFiles
from campaigns.sync import follow
from campaigns.sync import push as push_module
from campaigns.sync.follow import push_following
from campaigns.sync.push import PushResult
from campaigns.sync.remote import Node
from config.contracts.sample import Provenance, Sample
from config.errors import NodeUnreachable, StoreError
from config.locks import FileLock
from config.settings import Settings
from tests.fakes.in_process_node import InProcessNode

Told = Queue[PushResult | NodeUnreachable]
WAIT_S = 30


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "EVERY_S", 0.02)
    monkeypatch.setattr(push_module, "LONGEST_WAIT_S", 0.01)


@pytest.fixture
def files(home: Path) -> CampaignFiles:
    files = CampaignFiles(Settings(home=home), "c")
    files.path.mkdir(parents=True)
    return files


@pytest.fixture
def running(files: CampaignFiles) -> Iterator[FileLock]:
    lock = FileLock(files.lock)
    assert lock.acquire()
    lock.sign()
    yield lock
    lock.release()


@pytest.fixture
def there(tmp_path: Path) -> InProcessNode:
    return InProcessNode(tmp_path / "node")


def grow(files: CampaignFiles, *ids: str) -> None:
    made = Provenance(campaign="c", task_id="t")
    with files.samples.open("ab") as file:
        for id_ in ids:
            row = Sample(id=id_, domain="asm", source_id="s", messages=[], completion="c", provenance=made)
            file.write(row.model_dump_json().encode() + b"\n")


@pytest.fixture
def following(home: Path, there: InProcessNode) -> Iterator[Callable[[], tuple[Told, Told]]]:
    threads: list[threading.Thread] = []

    def start() -> tuple[Told, Told]:
        told, ended = Told(), Told()

        def run() -> None:
            node = Node("box", there.dial)
            ended.put(push_following(Settings(home=home), node, ["c"], lambda done, total: None, told.put))

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return told, ended

    yield start
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def rows(told: PushResult | NodeUnreachable) -> int:
    assert isinstance(told, PushResult), told
    return told.rows


def test_it_sends_what_is_new_until_the_campaign_ends(
    files: CampaignFiles, running: FileLock, following: Callable[[], tuple[Told, Told]]
) -> None:
    told, ended = following()  # before the first row
    grow(files, "1", "2")
    first = rows(told.get(timeout=WAIT_S))
    grow(files, *"34567")
    seen = [first]
    while seen[-1] < 7:
        seen.append(rows(told.get(timeout=WAIT_S)))
    assert seen == sorted(seen) and ended.empty()
    grow(files, "8")
    running.release()
    assert rows(ended.get(timeout=WAIT_S)) == 8


def test_a_lost_node_is_told_once_and_waited_for(
    files: CampaignFiles, running: FileLock, there: InProcessNode, following: Callable[[], tuple[Told, Told]]
) -> None:
    grow(files, "1")
    there.down = 40
    told, ended = following()
    assert isinstance(told.get(timeout=WAIT_S), NodeUnreachable)
    assert rows(told.get(timeout=WAIT_S)) == 1
    assert there.down == 0
    running.release()
    assert rows(ended.get(timeout=WAIT_S)) == 1 and told.empty()


def test_a_campaign_that_does_not_run_is_pushed_once(files: CampaignFiles, there: InProcessNode, home: Path) -> None:
    grow(files, "1")
    told: Told = Told()
    node = Node("box", there.dial)
    assert push_following(Settings(home=home), node, ["c"], lambda done, total: None, told.put).rows == 1
    there.down = 1000
    node.close()
    with pytest.raises(NodeUnreachable):
        push_following(Settings(home=home), node, ["c"], lambda done, total: None, told.put)


def test_a_campaign_that_ended_without_a_row_has_nothing_to_send(files: CampaignFiles, there: InProcessNode, home: Path) -> None:
    files.samples.write_bytes(b"\n")
    with pytest.raises(StoreError, match="no rows to send"):
        push_following(Settings(home=home), Node("box", there.dial), ["c"], lambda done, total: None, lambda told: None)
