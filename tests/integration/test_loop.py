"""`hafs run` from end to end with a teacher that repeats its fact and a tiny random base; each part killed once in the middle."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from config.locks import holder
from tests.fakes.hub import Hub
from tests.fakes.leftovers import end_nodes
from tests.fakes.served import served
from tests.fakes.tiny_model import write_tiny_model
from tests.fakes.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TARGET = 66
LOOP = """
name = "tiny"
campaign = "campaign.toml"
train = "sft.toml"

[evaluate]
questions = 4
examples = 1
"""
CAMPAIGN = f"""
name = "tiny"
target = {TARGET}
domains = {{ asm = 1.0 }}

[lanes.teacher]
provider = "ollama"
host = "URL"
model = "teacher"
slots = 4
"""
SFT = """
kind = "sft"
name = "hafs-tiny"
base = "BASE"
data = ["tiny"]
probe = "What does LDA #$10 do?"

[train]
epochs = 12
lr = 1e-2
save_steps = 5
max_length = 192
dtype = "float32"
"""


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The three files of a loop, their teacher running."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = write_tiny_model(tmp_path / "tiny.gguf")
    (tmp_path / "sft.toml").write_text(SFT.replace("BASE", str(base)))
    path = tmp_path / "loop.toml"
    path.write_text(LOOP)
    try:
        with served("fact_ollama", tmp_path, LAT="0.05", WRONG="6") as url:
            (tmp_path / "campaign.toml").write_text(CAMPAIGN.replace("URL", url))
            yield path
    finally:
        end_nodes(tmp_path)


def hafs(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "campaigns.cli.main", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(child: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = child.communicate(timeout=200)
    assert child.returncode == code, output
    return output


def sample_ids(home: Path) -> list[str]:
    data = (home / "training" / "tiny" / "samples.jsonl").read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line)["id"] for line in data.splitlines()]


def pipeline_of(home: Path) -> psutil.Process | None:
    for record in (home / "node" / "jobs").glob("*/attempts/*/runner.json"):
        runner = json.loads(record.read_text())["pid"]
        if psutil.pid_exists(runner):
            for child in psutil.Process(runner).children(recursive=True):
                if "trainer_node.pipeline" in child.cmdline():
                    return child
    return None


def trained_steps(home: Path) -> list[int]:
    files = list((home / "node" / "jobs").glob("*/metrics.jsonl"))
    return [json.loads(line)["step"] for file in files for line in file.read_bytes().splitlines()]


def whole_checkpoint(home: Path) -> bool:
    return any((home / "node" / "jobs").glob("*/checkpoints/*/COMPLETE.json"))


def test_the_loop_closes_and_a_second_run_reuses_everything(home: Path, loop: Path) -> None:
    output = finished(hafs("run", str(loop)))
    assert f"complete: {TARGET} of {TARGET} samples" in output
    assert "have the same tokens at the runtime" in output
    assert "registered hafs-tiny:v1, also hafs-tiny:latest" in output
    assert re.search(r"unseen-operands \(4 questions\)", output)
    assert "perplexity" in output.lower()
    command = output.strip().splitlines()[-1].strip()
    assert command.startswith(f"HAFS_HOME={home} ") and "chat hafs-tiny --prompt" in command
    assert len(set(sample_ids(home))) == TARGET
    assert (home / "loops" / "tiny" / "report.md").read_text().startswith("# asm: hafs-tiny:v1 against its base")

    again = finished(hafs("run", str(loop)))
    assert f"reused: {TARGET} samples" in again
    assert "already: nothing sent" in again
    assert "reused: job sft-" in again
    assert again.count("(reused)") == 6
    assert again.split("base against tuned")[1].split("seconds")[0] == output.split("base against tuned")[1].split("seconds")[0]

    status = json.loads(finished(hafs("status", "--json")))
    assert [campaign["state"] for campaign in status["campaigns"]] == ["complete"]
    assert [job["state"] for job in status["nodes"][0]["jobs"]] == ["SUCCEEDED"]
    assert [model["tag"] for model in status["nodes"][0]["models"]] == ["hafs-tiny:v1"]
    (step,) = json.loads(finished(hafs("lineage", "hafs-tiny:latest", "--json")))
    assert sorted(origin["id"] for origin in step["samples"]) == sorted(sample_ids(home))
    assert (step["version"]["tag"], step["campaigns"][0]["name"], step["missing"]) == ("hafs-tiny:v1", "tiny", [])
    answer = finished(hafs("chat", "hafs-tiny", "--prompt", "What does LDA #$10 do?"))
    assert answer.strip()
    missing = finished(hafs("chat", "no-such-model", "--prompt", "x"), 17)
    assert 'there is no model "no-such-model"' in missing and "hafs-tiny:latest" in missing


def test_kill_9_of_campaign_training_and_daemon_each_in_the_middle(home: Path, loop: Path) -> None:
    samples = home / "training" / "tiny" / "samples.jsonl"

    campaign = hafs("run", str(loop))
    wait_for("samples", lambda: samples.exists() and samples.read_bytes().count(b"\n") > 10)
    campaign.kill()
    campaign.communicate()
    whole = samples.read_bytes()
    before = [json.loads(line)["id"] for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
    assert 10 < len(before) < TARGET

    run = hafs("run", str(loop))
    wait_for("checkpoint", lambda: whole_checkpoint(home))
    trainer = pipeline_of(home)
    assert trainer is not None
    trainer.kill()
    steps = len(trained_steps(home))
    wait_for("second attempt", lambda: any((home / "node" / "jobs").glob("*/attempts/2/stage.json")))
    wait_for("new steps", lambda: len(trained_steps(home)) > steps + 1)
    daemon = holder(home / "node" / "daemon.lock")
    assert daemon
    os.kill(daemon, signal.SIGKILL)
    run.kill()
    run.communicate()

    output = finished(hafs("run", str(loop)))
    assert "attached: job sft-" in output
    ids = sample_ids(home)
    assert len(ids) == len(set(ids)) == TARGET
    assert set(before) <= set(ids)
    assert len(list((home / "node" / "jobs").iterdir())) == 1, "a second job was made"
    done = trained_steps(home)
    assert done == list(range(1, len(done) + 1)), "a step is missing or doubled"
    assert "going on from the checkpoint of step" in output


def test_ctrl_c_while_training_leaves_the_job_and_the_next_run_comes_back_to_it(home: Path, loop: Path) -> None:
    run = hafs("run", str(loop))
    wait_for("steps", lambda: trained_steps(home))
    run.send_signal(signal.SIGINT)
    output = finished(run, 130)
    assert "the same command continues" in output
    assert f"HAFS_HOME={home} " in output and "train cancel sft-" in output  # it can be typed as it is printed
    assert pipeline_of(home) is not None, "the job ended with the terminal"
    again = finished(hafs("run", str(loop)))
    assert "attached: job sft-" in again or "reused: job sft-" in again
    assert "registered hafs-tiny:v1" in finished(hafs("train", "status", "hafs-tiny"))


def test_the_base_of_the_evaluation_is_the_one_that_was_trained(home: Path, loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the hub without a commit means another file once another program has looked there again."""
    base = (loop.parent / "tiny.gguf").read_bytes()
    spec = loop.parent / "sft.toml"
    spec.write_text(SFT.replace("BASE", "hf:owner/tiny-GGUF/tiny.gguf"))
    cache = loop.parent / "cache"
    with Hub({"owner/tiny-GGUF": {"tiny.gguf": base}}) as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        report = finished(hafs("run", str(loop))).split("base against tuned")[1].split("seconds")[0]
    (cache / "models--owner--tiny-GGUF" / "refs" / "main").write_text("2e" * 20)
    shutil.rmtree(home / "loops" / "tiny" / "answers")
    again = finished(hafs("run", str(loop)))
    assert "reused: job sft-" in again
    assert again.split("base against tuned")[1].split("seconds")[0] == report
