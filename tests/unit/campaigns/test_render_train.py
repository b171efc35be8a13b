"""What `hafs train` and `hafs status` show, at the widths that people have."""

import io
import json
import time
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from campaigns.cli import render, render_overview, render_train
from campaigns.live import DomainFigures, Figures
from campaigns.locate import JobAt
from campaigns.overview import Overview
from campaigns.picture import Picture
from campaigns.store import CampaignFiles
from campaigns.sync.jobs import Unknown
from campaigns.sync.survey import NodeState, Seen
from campaigns.watching import JobPicture
from config.contracts.gpu import GpuReading
from config.contracts.job import JobState, JobView, Metrics
from config.contracts.wire import DatasetView, GpuResult, ModelVersion, ServerResult
from config.errors import NodeUnreachable
from config.settings import load_settings

Shown = Callable[[], list[str]]
BOX = GpuResult(
    reading=GpuReading(
        utilization=83,
        own_share=3,
        training_share=80,
        memory_used_bytes=10_200_000_000,
        memory_total_bytes=24_000_000_000,
        holder="python",
        leased_to="sft-0003-abcd",
        source="nvml",
    )
)


@pytest.fixture(params=[80, 200])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    """The lines that were printed, on a terminal of 80 and of 200 columns."""
    console = Console(file=io.StringIO(), width=request.param, force_terminal=True, color_system=None, soft_wrap=True)
    for module in (render, render_train, render_overview):
        monkeypatch.setattr(module, "console", console)

    def lines() -> list[str]:
        assert isinstance(console.file, io.StringIO)
        found = console.file.getvalue().splitlines()
        assert all(len(line) <= request.param for line in found), found
        return found

    yield lines


def job(number: int, state: JobState, detail: str = "") -> JobView:
    id_ = f"sft-{number:04d}-abcd"
    return JobView(id=id_, kind="sft", name="hafs-coder", state=state, detail=detail, created_at=number, updated_at=number)


def test_what_is_typed_again_is_never_cut(shown: Shown) -> None:
    found = [JobAt("box", job(number, JobState.PREPARING, "a long story " * 30 * number)) for number in range(3)]
    found.append(JobAt("box", job(3, JobState.RUNNING).model_copy(update={"name": "m" * 80})))
    render_train.jobs(found, False)
    assert [line.split()[:2] for line in shown()[1:]] == [[f"sft-{number:04d}-abcd", "box"] for number in range(4)]
    assert "PREPARING" in shown()[1] and "RUNNING" in shown()[4]


def test_a_job_that_was_told_to_stop_says_what_comes_next(shown: Shown) -> None:
    render_train.cancelled(JobAt("box", job(1, JobState.RUNNING)), False)
    render_train.cancelled(JobAt("box", job(2, JobState.CANCELLED)), False)
    assert [line for line in shown() if "it is stopping" in line] == [shown()[2]]


def test_a_job_that_has_succeeded_says_that_it_is_not_tried_again(shown: Shown) -> None:
    render_train.retried(JobAt("box", job(3, JobState.SUCCEEDED)), False)
    render_train.retried(JobAt("box", job(4, JobState.QUEUED)), False)
    assert sum("nothing to try again" in line for line in shown()) == 1


def test_what_has_ended_is_known_though_its_node_is_silent() -> None:
    assert render_train.detail(JobAt("box", job(1, JobState.FAILED, "no memory"), 5.0)) == "no memory"
    assert render_train.detail(JobAt("box", job(1, JobState.RUNNING, "step 3"), 5.0)).startswith("unknown since ")


def metrics(steps: int) -> list[Metrics]:
    return [
        Metrics(
            time=1000 + step, step=step, steps=300, epoch=step / 150, loss=3 - step / 200, lr=1e-3, tokens_per_s=1234, eta_s=400
        )
        for step in range(1, steps + 1)
    ]


def test_a_running_job_on_a_screen(shown: Shown) -> None:
    queue = [job(3, JobState.RUNNING), job(4, JobState.QUEUED), job(5, JobState.QUEUED)]
    seen = JobPicture("box", queue[0], metrics(120), queue, BOX)
    render_train.console.print(render_train.job_screen(seen, 1180.0), soft_wrap=False)
    text = "\n".join(shown())
    assert "sft-0003-abcd on box: RUNNING" in text
    assert "40 %  step 120 of 300, epoch 0.80, 5:40 to go" in text, "a minute has gone by since that line of metrics"
    assert "2.4000, lowest 2.4000, first 2.9950" in text and "█▇" in text
    assert "83 % (training 80, model server 3), 10.2 GB of 24.0 GB" in text
    assert "2 waiting: sft-0004-abcd, sft-0005-abcd" in text


def test_a_waiting_job_of_a_node_that_is_silent(shown: Shown) -> None:
    queue = [job(3, JobState.RUNNING), job(4, JobState.QUEUED, "the GPU is held by \x1b[31mollama")]
    seen = JobPicture("box", queue[1], [], queue, GpuResult(missing="no NVML"), Unknown(0.0, "off"))
    render_train.console.print(render_train.job_screen(seen, 0.0), soft_wrap=False)
    text = "\n".join(shown())
    assert "unknown since" in text and "1 before it, 0 after it" in text and "no NVML" in text and "\x1b" not in text
    assert "FAILED" not in text


def test_bars_are_means_and_the_highest_is_the_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_train, "console", Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8")))
    assert render_train.sparkline([8, 6, 4, 2, 2, 0, 0, 0], 4) == "█▄▂▁"
    assert render_train.sparkline([1.0, 1.0], 10) == "▁▁"
    monkeypatch.setattr(render_train, "console", Console(file=io.TextIOWrapper(io.BytesIO(), "cp1252")))
    assert render_train.sparkline([0, 1], 10) == " #"


def test_jobs_of_a_silent_node_are_unknown_and_not_failed(shown: Shown) -> None:
    render_train.jobs([JobAt("box", job(3, JobState.RUNNING, "step 5")), JobAt("far", job(4, JobState.RUNNING), 1e9)], False)
    text = "\n".join(shown())
    assert "unknown since 2001-09-09" in text and "step 5" in text and "FAILED" not in text


def test_since_says_the_day_only_where_it_was_another() -> None:
    assert render_train.since(0) == "unknown, it never answered"
    assert render_train.since(time.time()).count("-") == 0
    assert render_train.since(0.5).startswith("unknown since 19")


def usual(campaigns: int = 3, jobs: int = 3) -> tuple[Overview, list[Picture]]:
    """What a person has: a laptop, a GPU box that works, one that is off."""
    model = ModelVersion(
        tag="hafs-coder:v3",
        alias="hafs-coder:latest",
        kind="sft",
        job="sft-0002-abcd",
        base="SmolLM2",
        dataset_id="d",
        created_at=5,
        perplexity_base=9.1,
        perplexity_tuned=4.2,
    )
    data = DatasetView(id="d", name="asm-1", campaigns=["asm-1"], rows=1000, at=3)
    box = Seen(at=9, jobs=[job(number, JobState.SUCCEEDED) for number in range(1, jobs)], models=[model] * 4, datasets=[data])
    states = [
        NodeState("local", Seen(at=9), gpu=GpuResult(missing="NVML Shared Library Not Found")),
        NodeState("box", box, gpu=BOX, server=ServerResult(url="http://x", version="0.12.1", loaded=["qwen2.5-coder:7b"])),
        NodeState("attic", Seen(at=1e9, jobs=[job(9, JobState.RUNNING)]), NodeUnreachable("attic cannot be reached: no answer")),
    ]
    figures = Figures(target=2000, domains={"asm": DomainFigures(accepted=1234, rejected=137)}, cost_usd=1.5)
    pictures = [
        Picture(f"asm-{number}", CampaignFiles(load_settings(), f"asm-{number}"), "stopped: at the budget", None, figures, [])
        for number in range(1, campaigns + 1)
    ]
    return Overview("/home/someone/.context", [], states), pictures


@pytest.mark.parametrize(("campaigns", "jobs"), [(3, 3), (40, 200)])
def test_the_whole_loop_fits_one_screen(shown: Shown, campaigns: int, jobs: int) -> None:
    seen, pictures = usual(campaigns, jobs)
    render_overview.console.print(render_overview.overview_screen(seen, pictures, 0.0), soft_wrap=False)
    lines = shown()
    text = "\n".join(lines)
    assert len(lines) <= 23, "80x24 with the prompt"
    for words in (
        "asm-1",
        "1234 of 2000",
        "90 %",
        "on box 1000",
        "push unknown",
        "sft-0009-abcd",
        "RUNNING",
        "unknown since 2001-09-09",
    ):
        assert words in text, words
    for words in ("hafs-coder:v3", "9.10 -> 4.20", "83 %", "Ollama 0.12.1", "holds qwen2.5-coder:7b", "none runs"):
        assert words in text, words
    assert ("and 36 more" in text) == (campaigns == 40)


def test_where_every_node_answers_what_is_on_none_was_not_pushed(shown: Shown) -> None:
    seen, pictures = usual()
    seen.nodes.pop()
    render_overview.console.print(render_overview.overview_screen(seen, pictures, 0.0), soft_wrap=False)
    text = "\n".join(shown())
    assert "not pushed" in text and "push unknown" not in text


def test_an_empty_home_says_what_to_do(shown: Shown) -> None:
    seen = Overview("/home", [], [NodeState("local", Seen(at=9))])
    render_overview.console.print(render_overview.overview_screen(seen, [], 0.0), soft_wrap=False)
    text = "\n".join(shown())
    assert "campaign start FILE" in text and "train submit FILE" in text


def test_the_overview_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    seen, _ = usual()
    render_overview.overview(seen, True)
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert [(node["name"], node["unknown_since"]) for node in nodes] == [("local", None), ("box", None), ("attic", 1e9)]
    assert nodes[1]["gpu"]["reading"]["training_share"] == 80 and nodes[2]["jobs"][0]["state"] == "RUNNING"


def test_metrics_as_lines_of_json_and_as_a_table(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    render_train.metrics(metrics(3), True)
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [1, 2, 3]
    render_train.metrics(metrics(2), False)
    assert "2/300" in "\n".join(shown()) and "1.00e-03" in "\n".join(shown())
