"""The demo itself, with the real SmolLM2 as teacher and base: the claims of the README, and the exact command that it prints."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.domains.asm.domain import AsmDomain
from campaigns.evaluation.statistics import paired_difference
from tests.fakes.leftovers import end_nodes

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "demo"
    monkeypatch.setenv("HAFS_HOME", str(path))
    monkeypatch.setenv("HAFS_RUNTIME", "embedded")
    yield path
    end_nodes(tmp_path)


def test_the_demo_makes_a_model_that_is_better_than_its_base(home: Path) -> None:
    program = Path(sys.executable).parent / "hafs"
    run = subprocess.run([program, "run", "config/presets/demo.toml"], stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert {path.name for path in home.parent.iterdir()} == {"demo"}, "the demo writes below HAFS_HOME only"

    sheets = [json.loads(path.read_text()) for path in (home / "loops" / "demo" / "answers").iterdir()]
    domain = AsmDomain()
    items = [item.id for item in domain.benchmark("unseen-operands", 50)]
    by_contender = sorted((sheet for sheet in sheets if [answer["item_id"] for answer in sheet] == items), key=_right)
    *bases, tuned = by_contender
    assert len(bases) == 2
    for base in bases:
        gain = paired_difference([answer["correct"] for answer in tuned], [answer["correct"] for answer in base])
        assert gain.low > 0, run.stdout
    report = (home / "loops" / "demo" / "report.md").read_text()
    assert "unseen-operands: tuned beats base and base + 3 examples." in report
    trained = {row["source_id"] for row in map(json.loads, (home / "training/demo/samples.jsonl").read_text().splitlines())}
    held_out = {item.id for name in domain.benchmark_sets for item in domain.benchmark(name, 50)}
    assert not trained & held_out
    status = json.loads(subprocess.run([program, "status", "--json"], stdout=subprocess.PIPE, check=True).stdout)
    perplexity = status["nodes"][0]["jobs"][0]["result"]["perplexity"]
    assert perplexity["tuned"] < perplexity["base"]

    end_nodes(home)  # the demo has ended and nothing of it runs any more: the printed command starts what it needs
    command = run.stdout.strip().splitlines()[-1].strip()
    words = [word for word in shlex.split(command) if not word.startswith("HAFS_HOME=")]
    assert words[1:3] == ["chat", "hafs-coder"] and words[-1] == "What does LDA #$10 do?"
    answer = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ).stdout
    item = next(item for item in domain.benchmark("unseen-operands", 1000) if item.question == "What does LDA #$10 do?")
    verdict = domain.verify(item, answer.strip())
    assert verdict.accepted, f"{verdict.reason}: {answer}"


def _right(sheet: list[dict[str, object]]) -> int:
    return sum(bool(answer["correct"]) for answer in sheet)
