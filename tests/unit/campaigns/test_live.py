"""What a campaign's process writes each second, what others read of it, and how it is asked to stop."""

import logging
import os
from dataclasses import replace

import anyio
import pytest

from agents.lanes import LaneView
from agents.virtual_time import run_virtual
from campaigns import live
from campaigns.live import Live, LiveState, RunView, ask_to_stop, serve_live
from campaigns.picture import look_at
from campaigns.status import CampaignEnd, Progress
from config.errors import ConfigError, ProviderUnavailable
from config.settings import load_settings
from tests.fakes.campaign_rows import append, call, files, spec, store

LANE = LaneView(
    name="l",
    model="m",
    endpoint="ollama http://h",
    paid=False,
    in_flight=2,
    limit=4,
    ok=3,
    failed=1,
    idle="",
    idle_s={"rate": 2.0},
    latency_s=0.5,
    prompt_tokens=30,
    completion_tokens=20,
    cost_usd=0.0,
    last_error="",
)
END = CampaignEnd("budget", "the budget is met", 1, 1, 0.5)


@pytest.fixture
def progress() -> Progress:
    files().path.mkdir(parents=True)
    made = Progress(spec())
    made.count(call(0))
    made.count(call(1, "rejected"))
    return made


def test_what_is_published_is_what_others_read(progress: Progress) -> None:
    said = Live(files(), progress).publish(RunView([LANE], reserved_usd=0.25))
    assert live.read(files()) == said
    assert (said.pid, said.state, said.reserved_usd, said.end) == (os.getpid(), "running", 0.25, None)
    assert said.figures.domains["asm"].accepted == 1 and said.figures.domains["asm"].wanted == 9
    assert said.figures.reasons == {"flags": 1}
    assert said.figures.accept_rate == 0.5
    assert said.lanes[0].idle_s == {"rate": 2.0} and said.lanes[0].in_flight == 2


def test_nobody_answers_is_a_state_of_its_own(progress: Progress) -> None:
    running = Live(files(), progress)
    down = replace(LANE, idle="breaker", in_flight=0)
    assert running.publish(RunView([down])).state.startswith("waiting: no lane answers since ")
    assert running.publish(RunView([down, LANE])).state == "running"
    assert running.publish(RunView([down], note="paused: the disk is full")).state == "paused: the disk is full"


def test_a_disk_that_takes_no_news_is_logged_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    running = Live(files(), Progress(spec()))  # its folder does not exist
    for _ in range(3):
        running.publish(RunView([LANE]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_request_to_stop_is_heeded_once_and_only_by_whom_it_names(progress: Progress) -> None:
    files_ = files()
    running = Live(files_, progress)
    assert running.asked_to_stop() is None
    ask_to_stop(files_, os.getpid() + 1, now=True)
    assert running.asked_to_stop() is None
    ask_to_stop(files_, os.getpid(), now=True)
    request = running.asked_to_stop()
    assert request is not None and request.now
    assert running.asked_to_stop() is None


def test_a_request_to_an_earlier_process_with_the_same_number_is_void(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(live.time, "time", lambda: now)
    ask_to_stop(files(), os.getpid(), now=False)
    now = 1010.0
    assert Live(files(), progress).asked_to_stop() is None


def test_serving_publishes_shows_and_hands_a_request_on(progress: Progress) -> None:
    shown: list[LiveState] = []
    asked: list[bool] = []

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(serve_live, Live(files(), progress), progress, lambda: RunView([LANE]), asked.append, shown.append)
            await anyio.sleep(2.5)
            ask_to_stop(files(), os.getpid(), now=False)
            await anyio.sleep(1)
            group.cancel_scope.cancel()

    run_virtual(run)
    assert asked == [False]
    assert len(shown) == 4


def test_a_campaign_seen_from_outside_while_it_runs_and_afterwards() -> None:
    settings = load_settings()
    with pytest.raises(ConfigError, match='no campaign "x"'):
        look_at(settings, "x")
    progress = Progress(spec())
    with store() as opened:
        anyio.run(append, opened, 0)
        seen = look_at(settings, "x")
        assert (seen.state, seen.pid, seen.figures.accepted) == ("running", os.getpid(), 1)  # counted: nothing is published yet
        running = Live(files(), progress)
        running.publish(RunView([LANE], note="draining"))
        seen = look_at(settings, "x")
        assert (seen.state, seen.lanes[0].name, seen.figures.accepted) == ("draining", "l", 0)  # as its process has told it
    assert look_at(settings, "x").state.startswith("stopped: cut off (killed,")
    running.publish(RunView([LANE]), END)
    seen = look_at(settings, "x")
    assert (seen.state, seen.running, seen.figures.accepted) == ("stopped: at the budget", False, 1)
    running.publish(RunView([]), ProviderUnavailable("cannot connect", hint="start it"))
    seen = look_at(settings, "x")
    assert seen.state == "stopped: cannot connect"
    assert seen.end is not None and seen.end.hint == "start it"


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}', "[]"])
def test_news_that_cannot_be_read_is_no_news(progress: Progress, text: str) -> None:
    (files().path / "live.json").write_text(text)
    assert live.read(files()) is None


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hafs.campaign")
