"""`hafs campaign check` against a real server on loopback: without --probe it is asked nothing."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

MOCK = Path(__file__).parents[1] / "fakes" / "mock_models.py"
SPEC = """
name = "checked"
target = 20
domains = { asm = 1.0 }
[lanes.gpu]
provider = "ollama"
host = "URL"
models = ["there", "absent"]
[lanes.vllm]
provider = "openai"
base_url = "URL/v1"
model = "there:latest"
"""


@pytest.fixture
def server() -> Iterator[str]:
    environment = os.environ | {"LAT": "0.05", "MODELS": "there:latest"}
    with subprocess.Popen([sys.executable, MOCK, "0"], stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout
        try:
            yield f"http://127.0.0.1:{child.stdout.readline().strip()}"
        finally:
            child.kill()


@pytest.fixture
def spec(tmp_path: Path, server: str) -> Path:
    path = tmp_path / "checked.toml"
    path.write_text(SPEC.replace("URL", server))
    return path


def check(spec: Path, *options: str) -> tuple[int, Any]:
    command = [sys.executable, "-m", "campaigns.cli.main", "campaign", "check", str(spec), "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


def seen_by(server: str) -> Any:
    with urllib.request.urlopen(f"{server}/stats", timeout=10) as reply:
        return json.load(reply)


def test_without_a_probe_the_server_is_asked_nothing(spec: Path, server: str) -> None:
    code, checked = check(spec)
    assert (code, checked["probes"]) == (0, [])
    assert seen_by(server).get("n", 0) == 0


def test_a_probe_asks_every_lane_once_and_names_the_model_that_is_missing(spec: Path, server: str) -> None:
    code, checked = check(spec, "--probe")
    probes = {probe["lane"]: probe for probe in checked["probes"]}
    assert code == 17
    assert probes["gpu:absent"]["missing"] and "absent" in probes["gpu:absent"]["error"]
    for name in ("gpu:there", "vllm"):
        assert probes[name]["error"] == "" and probes[name]["latency_s"] >= 0.05 and probes[name]["usage"]["completion_tokens"]
    assert seen_by(server)["n"] == 2
    assert {lane["name"]: lane["basis"] for lane in checked["estimate"]["lanes"]}["gpu:there"] == "probe"


def test_pull_fetches_what_is_missing(spec: Path) -> None:
    code, checked = check(spec, "--pull", "--probe")
    assert (code, checked["pulled"]) == (0, ["gpu:absent"])
    assert all(probe["error"] == "" for probe in checked["probes"])


def test_a_server_that_is_down_is_told_of_its_lane(tmp_path: Path) -> None:
    path = tmp_path / "checked.toml"
    path.write_text(SPEC.replace("URL", "http://127.0.0.1:9"))
    code, checked = check(path, "--probe")
    assert code == 11
    assert len(checked["probes"]) == 3 and all("127.0.0.1:9" in probe["error"] for probe in checked["probes"])
