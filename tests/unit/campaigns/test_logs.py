"""Lines of a campaign's log: what they say, and that nothing a server says makes a second one."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.lanes import Idle, LaneEvent
from campaigns.logs import Narrator, line_of, log_call, log_end, log_event, log_lines, log_to, summary_of
from campaigns.status import CampaignEnd, Progress
from config.errors import ConfigError, ProviderUnavailable
from config.settings import load_settings
from tests.fakes.campaign_rows import call, files, spec, store
from tests.unit.campaigns.test_live import LANE

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING|ERROR) +\w+ .*")


@pytest.fixture
def path(home: Path) -> Path:
    return files().log


class Clock:
    def __init__(self) -> None:
        self.now = self.wall = 0.0

    def tell(self, progress: Progress) -> Narrator:
        return Narrator(progress, clock=lambda: self.now, wall=lambda: self.wall)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def written(path: Path) -> Iterator[list[str]]:
    """Lines without their times, once the test asks for them."""

    class Written(list[str]):
        def __iter__(self) -> Iterator[str]:
            return iter([line.split(" ", 1)[1] for line in path.read_text().splitlines()])

    with log_to(path):
        yield Written()


def test_calls_in_words() -> None:
    answered = call(0).model_copy(update={"cell": "adc-imm", "lane": "flash", "latency_s": 1.23, "completion_tokens": 48})
    assert line_of(answered.model_copy(update={"cost_usd": 0.0001})) == "accepted asm adc-imm lane=flash 1.2s 48 tok $0.0001"
    free = {"cost_usd": 0.0, "verdict": "rejected", "reason": "operand", "attempt": 2}
    assert line_of(answered.model_copy(update=free)) == "rejected asm adc-imm lane=flash attempt=2 1.2s 48 tok reason=operand"
    lost = {"verdict": "failed", "reason": "unavailable", "detail": "the connection broke\nand more", "cost_assumed": True}
    assert line_of(answered.model_copy(update={**lost, "cost_usd": 0.02})) == (
        "failed asm adc-imm lane=flash $0.0200 assumed reason=unavailable: the connection broke and more"
    )


def test_lane_events_in_words() -> None:
    assert line_of(LaneEvent("gpu", "down", "cannot connect\r\nINFO forged")) == "lane gpu down: cannot connect INFO forged"
    assert line_of(LaneEvent("gpu", "back", "")) == "lane gpu back"
    assert line_of(LaneEvent("gpu", "idle", "rate for 60 s")) == "lane gpu idle: rate for 60 s (rate limit reached)"
    assert line_of(LaneEvent("gpu", "idle", "threshold")) == "lane gpu idle: threshold (others use its GPU)"


def test_every_line_has_time_level_and_event_and_loud_ones_stand_out(path: Path, written: list[str]) -> None:
    progress = Progress(spec())
    log_event(LaneEvent("gpu", "down", "x\x1b[31m" + "y" * 5000))
    log_event(LaneEvent("gpu", "limit", "4 at once"))
    log_call(call(1, "failed"))
    log_end(ProviderUnavailable("nobody answers", hint="start it"), progress, [LANE], 61.0)
    lines = path.read_text().splitlines()
    assert all(LINE.fullmatch(line) and len(line) < 600 for line in lines)
    levels = [line.split()[1] for line in lines]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO", "ERROR"]
    assert lines[-2].endswith("lane l total ok=3 failed=1 tok=30+20 cost=$0.0000 idle: rate 2s")
    assert lines[-1].endswith(
        "end reason=ProviderUnavailable accepted=0 calls=0 cost=$0.0000 wall=1:01: nobody answers; start it"
    )


def test_a_summary_each_minute_and_a_stall_after_five(written: list[str]) -> None:
    clock, progress = Clock(), Progress(spec())
    narrator = clock.tell(progress)
    progress.count(call(0, "rejected"))
    for second in range(1, 365):
        clock.pass_s(1)
        narrator.tick([replace(LANE, ok=second, idle="rate")], "")
    summaries = [line for line in written if " summary " in line]
    assert len(summaries) == 6
    assert summaries[1] == ("INFO    summary 0/9 0% 0/s eta=? accept=0% failed=0 cost=$0.5000; l 1.00/s 2 of 4 at once (rate)")
    assert [line for line in written if " stall " in line] == ["WARNING stall no call has ended for 5:00 (l: rate)"]


def test_requests_that_failed_and_are_made_again_are_told_now_and_then(written: list[str]) -> None:
    clock, progress = Clock(), Progress(spec())
    narrator = clock.tell(progress)
    for failed in (0, 1, 3, 8):
        clock.pass_s(6)
        narrator.tick([replace(LANE, failed=failed, last_error="429\nslow down")], "")
        narrator.tick([replace(LANE, failed=failed, last_error="429\nslow down")], "")
    clock.pass_s(6)
    narrator.tick([replace(LANE, failed=8, last_error="429\nslow down")], "")
    assert list(written) == [
        "WARNING lane l failing: 1 request, made again or elsewhere; the last: 429 slow down",
        "WARNING lane l failing: 7 requests, made again or elsewhere; the last: 429 slow down",
    ]


def test_a_gpu_that_is_free_again_is_told(written: list[str]) -> None:
    clock, progress = Clock(), Progress(spec())
    narrator = clock.tell(progress)
    quiet = replace(LANE, failed=0)
    looks: list[tuple[int, Idle]] = [(30, "threshold"), (1, ""), (30, "lease"), (30, ""), (30, "limit")]
    for idle in (idle for times, idle in looks for _ in range(times)):
        clock.pass_s(1)
        narrator.tick([replace(quiet, idle=idle)], "")
    assert [line for line in written if " back" in line] == ["INFO    lane l back: its GPU is free again, after 1:00"]


def test_budget_marks_are_told_once_each(written: list[str]) -> None:
    clock, progress = Clock(), Progress(spec(budget={"max_usd": 2.0}))
    narrator = clock.tell(progress)
    for number in range(4):
        progress.count(call(number))
        narrator.tick([], "")
        narrator.tick([], "")
    assert list(written) == [
        "WARNING budget 50% used: $1.00 of $2.00",
        "WARNING budget 100% used: $2.00 of $2.00",
    ]


def test_a_budget_mark_of_an_earlier_run_is_not_told_again(written: list[str]) -> None:
    progress = Progress(spec(budget={"max_usd": 0.5}))
    progress.count(call(0))
    Clock().tell(progress).tick([], "")
    assert list(written) == []


def test_pauses_and_a_machine_that_slept(written: list[str]) -> None:
    clock, progress = Clock(), Progress(spec())
    narrator = clock.tell(progress)
    narrator.tick([], "paused: no space left")
    narrator.tick([], "paused: no space left")
    narrator.tick([], "")
    clock.wall += 3723
    narrator.tick([], "draining")
    assert list(written) == [
        "WARNING pause paused: no space left",
        "INFO    resume it goes on after: paused: no space left",
        "WARNING resume after 1:02:03 in which nothing ran (the machine slept, or its clock was set)",
        "INFO    pause draining",
    ]


def test_the_summary_of_many_lanes() -> None:
    progress = Progress(spec())
    progress.count(call(0))
    text = summary_of(progress, [LANE, replace(LANE, name="b", idle="breaker", in_flight=0)], {"l": 30}, 60)
    assert text.endswith("cost=$0.5000; l 0.50/s 2 of 4 at once; b 0.00/s 0 of 4 at once (breaker)")


def test_following_ends_with_the_process_and_keeps_the_last_words(path: Path) -> None:
    with store():
        with log_to(path):
            log_event(LaneEvent("a", "back", ""))
        lines = log_lines(load_settings(), "x", follow=True)
        assert next(lines).endswith("lane a back")
        path.write_text(path.read_text() + "half a line")
    assert list(lines) == ["half a line"]


def test_no_log_is_said(home: Path) -> None:
    with pytest.raises(ConfigError, match="no log of a campaign"):
        list(log_lines(load_settings(), "nobody", follow=False))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("hafs.campaign").handlers.clear()


def test_the_end_in_words(written: list[str]) -> None:
    log_end(CampaignEnd("drained", "stopped", 1, 1, 0.0), Progress(spec()), [], 1.0)
    assert list(written) == ["INFO    end reason=drained accepted=0 calls=0 cost=$0.0000 wall=0:01: stopped"]
