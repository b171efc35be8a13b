"""The report of a campaign adds up, over all its runs."""

import anyio

from agents.lanes import LaneView
from campaigns.live import Live, RunView
from campaigns.report import facts, markdown, report_of
from campaigns.status import CampaignEnd, Progress
from campaigns.store import Call
from config.settings import load_settings
from tests.fakes.campaign_rows import call, files, row, spec, store
from tests.unit.campaigns.test_live import LANE

RUNS = {0: 1000.0, 1: 1010.0, 2: 1040.0, 3: 9000.0, 4: 9010.0}  # two runs with a pause between them


def ended(number: int, verdict: str) -> Call:
    figures = {
        "time": RUNS[number],
        "latency_s": number + 1.0,
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "thinking_tokens": 5,
    }
    return call(number, verdict).model_copy(update={**figures, "model": "" if verdict == "failed" else "m"})


async def write() -> None:
    with store() as opened:
        for number, verdict in enumerate(["accepted", "rejected", "failed", "accepted", "accepted"]):
            await opened.append(ended(number, verdict), row(number, verdict))


def test_figures_add_up() -> None:
    anyio.run(write)
    report = report_of(load_settings(), "x")
    (lane,) = report.lanes
    assert (lane.lane, lane.model, lane.ok, lane.accepted, lane.failed) == ("l", "m", 4, 3, 1)
    assert (lane.prompt_tokens, lane.completion_tokens, lane.cost_usd) == (500, 75, 2.5)
    assert (lane.latency_median_s, lane.latency_p95_s) == (4.0, 4.0)
    assert report.wall_s == 50.0  # the pause between the runs is no work
    assert report.samples_per_s == 3 / 50
    assert report.usd_per_sample == 2.5 / 3
    assert facts(report)["reasons"] == {"flags": 2}


def test_the_page_reads_as_markdown() -> None:
    anyio.run(write)
    view: LaneView = LANE
    Live(files(), Progress(spec())).publish(RunView([view]), CampaignEnd("drained", "stopped", 3, 3, 2.5))
    page = markdown(report_of(load_settings(), "x"))
    assert page.startswith("# Campaign x: stopped\n\n3 of 9 samples; 75 % of the answers were accepted; 1 calls failed.\n")
    assert "| asm    |        3 |      9 | 33 % |        1 |      1 |" in page
    assert "| flags  |     2 | 100 % |" in page
    assert "In the last run alone" in page
    assert "| l    | rate limit reached |       2 |" in page
    assert "several requests" not in page
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    assert all(len({len(line) for line in table}) == 1 for table in tables)


def test_a_task_that_moved_is_told_where_it_counts() -> None:
    async def write_one() -> None:
        with store() as opened:
            await opened.append(ended(0, "accepted").model_copy(update={"attempt": 3}), row(0, "accepted"))

    anyio.run(write_one)
    report = report_of(load_settings(), "x")
    assert report.lanes[0].retried == 1
    assert "A task that took several requests stands, with all that they cost, at the lane of the last one." in markdown(report)


def test_an_empty_campaign_has_a_report_too() -> None:
    with store():
        pass
    report = report_of(load_settings(), "x")
    assert (report.lanes, report.wall_s, report.samples_per_s, report.usd_per_sample) == ([], 0.0, None, None)
    assert "0 of 9 samples" in markdown(report)
