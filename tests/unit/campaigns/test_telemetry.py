"""Readings through the real calls, over a node in this process that can be told where to break."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from campaigns import telemetry as telemetry_module
from campaigns.sync import remote
from campaigns.sync.remote import Node, Nodes
from campaigns.telemetry import NodeTelemetry, open_telemetry
from config.contracts.gpu import GpuReading
from config.contracts.wire import GpuResult
from config.errors import ConfigError
from config.settings import LOCAL, Settings
from tests.fakes.in_process_node import InProcessNode
from trainer_node import gpu

READING = GpuReading(utilization=70, own_share=20, source="nvml")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry_module.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(remote, "RETRY_S", 0)
    return clock


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcessNode:
    monkeypatch.setattr(gpu, "look", lambda root: GpuResult(reading=READING))
    return InProcessNode(tmp_path / "node")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="hafs.campaign")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "hafs.campaign"]


@pytest.fixture
def telemetry(box: InProcessNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeTelemetry]:
    """Of that node, with all the time it needs; closed at the end."""
    monkeypatch.setattr(telemetry_module, "READ_S", 60)

    def dial() -> Node:
        node = Node("box", box.dial)
        node.open()
        return node

    found = NodeTelemetry("box", dial)
    yield found
    found.close()


def test_readings_come_over_one_connection(telemetry: NodeTelemetry, box: InProcessNode) -> None:
    async def work() -> None:
        assert [await telemetry.read() for _ in range(5)] == [READING] * 5

    anyio.run(work)
    assert box.dialled == 1 and box.asked == ["ping", *["gpu"] * 5]


def test_a_lost_answer_is_asked_for_again_at_once(telemetry: NodeTelemetry, box: InProcessNode, clock: Clock) -> None:
    box.lose_answer_of = "gpu"
    assert anyio.run(telemetry.read) == READING
    assert box.dialled == 2


def test_a_lost_node_is_no_reading_and_tried_ever_more_rarely(
    telemetry: NodeTelemetry, box: InProcessNode, clock: Clock, told: Callable[[], list[str]]
) -> None:
    box.down = 7
    tries, begin = [], clock.now
    while box.down and clock.now < begin + 1000:
        left = box.down
        assert anyio.run(telemetry.read) is None
        if box.down < left:
            tries.append(clock.now - begin)
        clock.now += 1
    assert tries == [0, 1, 3, 7, 15, 31, 63]
    clock.now += 60
    assert anyio.run(telemetry.read) == READING
    lost, back = told()
    assert lost == "no GPU telemetry of box: the node is off; trying again" and "is there" in back


def test_a_node_that_does_not_know_the_verb_is_left_alone_for_a_minute(
    telemetry: NodeTelemetry, clock: Clock, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_module, "GPU", type(telemetry_module.GPU)("teleport", remote.Nothing, GpuResult))
    assert anyio.run(telemetry.read) is None
    clock.now += 59
    assert anyio.run(telemetry.read) is None
    assert len(told()) == 1 and "does not know the verb" in told()[0] and "hafs nodes upgrade" in told()[0]


def test_a_node_without_a_gpu_says_so_once(
    telemetry: NodeTelemetry, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "look", lambda root: GpuResult(missing="NVML Shared Library Not Found"))
    assert [anyio.run(telemetry.read) for _ in range(3)] == [None] * 3
    assert told() == ["box cannot see its GPU (NVML Shared Library Not Found)"]


def test_a_bug_ends_no_campaign(telemetry: NodeTelemetry, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Node, "call", crash)
    assert anyio.run(telemetry.read) is None
    assert told() == ["no GPU telemetry of box: oops (ZeroDivisionError); trying again"]


def test_a_slow_node_keeps_nobody_waiting_and_is_asked_once_at_a_time(
    telemetry: NodeTelemetry, box: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Semaphore(0), threading.Event()

    def slow(root: Path) -> GpuResult:
        entered.release()
        go_on.wait(60)
        return GpuResult(reading=READING)

    monkeypatch.setattr(gpu, "look", slow)
    monkeypatch.setattr(telemetry_module, "READ_S", 0.05)

    async def work() -> None:
        try:
            assert [await telemetry.read() for _ in range(4)] == [None] * 4
            assert entered.acquire(timeout=30) and not entered.acquire(blocking=False)
        finally:
            go_on.set()
        with anyio.fail_after(30):
            while await telemetry.read() != READING:
                await anyio.lowlevel.checkpoint()

    anyio.run(work)
    assert box.dialled == 1


def test_what_is_closed_in_the_middle_of_a_call_leaves_nothing_open(
    telemetry: NodeTelemetry, box: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, closed = threading.Event(), threading.Event(), []

    def slow(root: Path) -> GpuResult:
        entered.set()
        go_on.wait(60)
        return GpuResult(reading=READING)

    monkeypatch.setattr(gpu, "look", slow)
    monkeypatch.setattr(telemetry_module, "READ_S", 0.05)
    monkeypatch.setattr(Node, "close", lambda self, close=Node.close: closed.append(threading.get_ident()) or close(self))
    try:
        assert anyio.run(telemetry.read) is None
        assert entered.wait(30)
        telemetry.close()
        thread = [thread for thread in threading.enumerate() if "AnyIO" in thread.name]
    finally:
        go_on.set()
    for worker in thread:
        worker.join(30)
    assert len(set(closed)) == 2, "once from here, once by the call's own thread when it ended"
    assert anyio.run(telemetry.read) is None


def test_a_node_that_does_not_exist_is_said_at_once(home: Path) -> None:
    async def work() -> None:
        async with open_telemetry(Nodes(Settings(home=home)), "nowhere"):
            raise AssertionError("opened")

    with pytest.raises(ConfigError, match='no node "nowhere"'):
        anyio.run(work)


def test_this_machine_is_a_node_like_any_other(
    home: Path, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real child process; on a machine without a GPU it says that there is none."""
    monkeypatch.setattr(telemetry_module, "READ_S", 60)

    async def work() -> GpuReading | None:
        async with open_telemetry(Nodes(Settings(home=home)), LOCAL) as telemetry:
            return await telemetry.read()

    reading = anyio.run(work)
    assert reading is not None or "local cannot see its GPU" in told()[0]
