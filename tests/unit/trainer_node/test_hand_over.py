"""What a model server holds before and while a model is trained; the server keeps to recorded exchanges."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.errors import LeaseLost
from tests.fakes.holding_ollama import HoldingOllama
from tests.fakes.waiting import wait_for
from trainer_node import hand_over
from trainer_node.gpu import CardMemory
from trainer_node.hand_over import in_the_way, watched
from trainer_node.ollama import OllamaApi

RECORDED = Path(__file__).parents[2] / "data" / "ollama" / "generate.json"


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[HoldingOllama]:
    with HoldingOllama() as server:
        monkeypatch.delenv("HAFS_RUNTIME", raising=False)
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        yield server


def card(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 16, holder: str = "python", pid: int = 7) -> None:
    monkeypatch.setattr(hand_over, "card_memory", lambda: CardMemory(free * 10**9, total * 10**9, holder, pid))


def test_the_fake_keeps_to_what_was_recorded(ollama: HoldingOllama) -> None:
    steps = {step["name"]: step for step in json.loads(RECORDED.read_text())["steps"]}
    ollama.loaded = ["base:latest"]
    entry = ollama.ps()[1]["models"][0]
    assert entry.keys() == steps["loaded"]["response"]["json"]["models"][0].keys()
    status, answer = ollama.generate({"model": "base", "keep_alive": 0})
    recorded = steps["unload"]["response"]
    assert (status, answer.keys()) == (recorded["status"], recorded["json"].keys())
    assert answer["done_reason"] == recorded["json"]["done_reason"]


def test_every_model_is_asked_to_go_and_free_is_what_is_listed_no_more(ollama: HoldingOllama, tmp_path: Path) -> None:
    ollama.loaded, ollama.busy = ["qwen3:8b", "base:latest"], {"qwen3:8b"}
    assert "qwen3:8b, base:latest" in in_the_way(tmp_path, 0)
    assert ollama.asked == ["qwen3:8b", "base:latest"]
    said = in_the_way(tmp_path, 0)
    assert f"Ollama at {ollama.url}, which still holds qwen3:8b" == said, "the answer to the unload is no proof"
    ollama.finish("qwen3:8b")
    assert in_the_way(tmp_path, 0) == ""
    ollama.loaded = ["again:latest"]
    assert "again:latest" in in_the_way(tmp_path, 0) and ollama.asked[-1] == "again:latest"
    assert in_the_way(tmp_path, 0) == ""


def test_a_model_that_was_deleted_is_waited_for_with_the_reason(ollama: HoldingOllama, tmp_path: Path) -> None:
    ollama.loaded, ollama.gone = ["lost:latest"], {"lost:latest"}
    assert "lost:latest (" in (said := in_the_way(tmp_path, 0)) and "404" in said


def test_a_server_that_does_not_say_is_in_the_way_and_none_is_not(
    ollama: HoldingOllama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ollama.broken = True
    assert "does not say what it holds" in in_the_way(tmp_path, 0)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    assert in_the_way(tmp_path, 0) == ""


def test_the_models_of_another_machine_are_left_there(
    ollama: HoldingOllama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ollama.loaded = ["theirs:latest"]
    monkeypatch.setattr(hand_over, "is_of_this_machine", lambda url: url != ollama.url)
    assert in_the_way(tmp_path, 0) == "" and not ollama.asked


def test_the_gpu_has_to_be_free_as_well(ollama: HoldingOllama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed_mb = 8e9 / 2**20
    card(monkeypatch, free=3)
    assert in_the_way(tmp_path, needed_mb) == (
        "8.0 GB of GPU memory, of which 3.0 GB are free; most is held by python (process 7)"
    )
    assert in_the_way(tmp_path, 0) == "", "none is trained on"
    ollama.loaded = ["qwen3:8b"]
    assert "qwen3:8b" in in_the_way(tmp_path, needed_mb), "the model first: it may be all that is in the way"
    card(monkeypatch, free=3, holder="", pid=0)
    assert in_the_way(tmp_path, needed_mb).endswith("3.0 GB are free")
    card(monkeypatch, free=9)
    assert in_the_way(tmp_path, needed_mb) == ""
    card(monkeypatch, free=3, total=7)
    assert in_the_way(tmp_path, needed_mb) == "", "it would wait for ever: the plan refuses that"


def test_what_is_loaded_meanwhile_is_told_once(ollama: HoldingOllama, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    with watched(tmp_path, told.append, every_s=0.005):
        wait_for("a look", lambda: ollama.looks > 2)
        ollama.loaded = ["qwen3:8b"]
        wait_for("the word of it", lambda: told)
        looks = ollama.looks
        wait_for("more looks", lambda: ollama.looks > looks + 3)
        ollama.broken = True
        looks = ollama.looks
        wait_for("looks that fail", lambda: ollama.looks > looks + 1)
        ollama.broken = False
        looks = ollama.looks
        wait_for("looks that do not", lambda: ollama.looks > looks + 1)
        assert told == ["loaded meanwhile, and shares the memory: qwen3:8b"]
        ollama.loaded = []
        wait_for("the end of it", lambda: len(told) > 1)
    assert told[1:] == [""] and not ollama.asked, "nothing is taken from anybody"
    assert ["takes memory" in record.message for record in caplog.records].count(True) == 1


def test_a_lease_that_is_lost_ends_no_training(ollama: HoldingOllama, tmp_path: Path) -> None:
    def tell(_: str) -> None:
        raise LeaseLost("given up")

    ollama.loaded = ["qwen3:8b"]
    with watched(tmp_path, tell, every_s=0.005):
        wait_for("looks", lambda: ollama.looks > 3)


def test_one_model_is_asked_to_go(ollama: HoldingOllama) -> None:
    ollama.loaded = ["base:latest", "other:latest"]
    with OllamaApi(ollama.url) as api:
        assert api.loaded() == ["base:latest", "other:latest"]
        api.ask_to_unload("base:latest")
        assert api.loaded() == ["other:latest"]
