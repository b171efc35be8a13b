"""What a spec would do, on a clock that does not wait."""

from pathlib import Path
from typing import Any

import pytest

from agents.simulated import Window
from campaigns.described import assume, described, parse_option
from campaigns.history import Past
from campaigns.simulate import Simulation, simulate
from campaigns.spec import CampaignSpec
from config.errors import ConfigError
from config.settings import Settings

GPU = {"provider": "ollama", "host": "http://127.0.0.1:11434", "model": "q", "slots": 4}
FLASH = {"provider": "gemini", "model": "gemini-2.5-flash", "rpm": 300}
EXACT = "spread:0,accept:1"


def campaign(**changes: Any) -> CampaignSpec:
    whole = {"name": "x", "target": 600, "domains": {"asm": 1}, "lanes": {"gpu": GPU, "flash": FLASH}}
    return CampaignSpec.model_validate(whole | changes)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def go(spec: CampaignSpec, *options: str, seed: int = 0) -> Simulation:
        return simulate(Settings(home=tmp_path), spec, tmp_path, described(options, None, spec), seed)

    return go


def test_one_lane_takes_the_time_that_can_be_worked_out(run: Any) -> None:
    seen = run(campaign(lanes={"gpu": GPU}), f"gpu=latency:0.8,{EXACT}")
    assert (seen.end, seen.accepted, seen.rejected, seen.left) == ("done", 600, 0, 0)
    assert seen.seconds == pytest.approx(600 * 0.8 / 4, rel=0.02)
    assert seen.cost_usd == 0
    assert [round(seconds) for seconds in seen.milestones.values()] == pytest.approx([30, 60, 90, 120], abs=2)


def test_a_hybrid_campaign_uses_both_lanes(run: Any) -> None:
    """Best is 60 s: 5/s and 5/s."""
    seen = run(campaign(), f"gpu=latency:0.8,{EXACT}", f"flash=latency:0.4,{EXACT}")
    assert seen.end == "done" and seen.seconds <= 65
    calls = {lane.name: lane.calls for lane in seen.lanes}
    assert calls["gpu"] == pytest.approx(300, abs=30)
    assert all(server.busiest_minute <= 300 for key, server in seen.servers.items() if "Gemini" in key)


def test_the_money_ends_it(run: Any) -> None:
    seen = run(campaign(lanes={"flash": FLASH}, budget={"max_usd": 0.05}))
    assert seen.end == "budget" and seen.left > 0
    assert 0.97 * 0.05 <= seen.cost_usd <= 0.05
    assert sum(lane.cost_usd for lane in seen.lanes) == pytest.approx(seen.cost_usd)


def test_an_outage_is_seen_and_survived(run: Any) -> None:
    seen = run(campaign(lanes={"gpu": GPU}), f"gpu=latency:0.8,{EXACT},down:30-60")
    assert (seen.end, seen.accepted) == ("done", 600)
    assert seen.seconds == pytest.approx(150, rel=0.1)
    assert {event.kind for _, event in seen.events} >= {"down", "back"}


def test_a_lane_that_stays_down_ends_in_words(run: Any) -> None:
    seen = run(campaign(lanes={"gpu": GPU}), "gpu=down:0-1000h")
    assert (seen.end, seen.accepted, seen.left) == ("failed", 0, 600)
    assert "no lane answers" in seen.message


def test_two_models_on_one_server_swap_seldom(run: Any) -> None:
    two = {"gpu": GPU | {"model": "", "models": ["a", "b"]}}
    seen = run(campaign(lanes=two), f"gpu=latency:0.8,swap:2,{EXACT}")
    [server] = seen.servers.values()
    assert server.swaps <= 8
    assert {lane.name for lane in seen.lanes if lane.calls} == {"gpu:a", "gpu:b"}


def test_the_same_seed_is_the_same_run(run: Any) -> None:
    spec = campaign(target=200)
    assert run(spec, seed=1) == run(spec, seed=1)
    assert run(spec, seed=1).seconds != run(spec, seed=2).seconds


# descriptions


def test_an_option_becomes_a_description() -> None:
    name, said = parse_option("gpu:a=latency:90s,par:2,accept:0.5,down:5m-10m,down:1h-2h,gpu:0-60@80,faults:503")
    assert name == "gpu:a"
    assert (said.latency, said.par, said.accept, said.down, said.gpu) == (90.0, 2, 0.5, ["5m-10m", "1h-2h"], ["0-60@80"])


@pytest.mark.parametrize(
    ("option", "words"),
    [("gpu", "no lane"), ("=par:1", "no lane"), ("gpu=par", "no value"), ("gpu=pra:1", "pra"), ("gpu=accept:2", "accept")]
    + [("gpu=down:later", "down"), ("gpu=faults:nonsense", "faults"), ("gpu=latency:0", "latency"), ("nolane=par:1", "nolane")],
)
def test_an_option_that_is_none_is_an_error(option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        described([option], None, campaign())


def test_a_window_has_to_end_after_it_starts() -> None:
    spec = campaign()
    with pytest.raises(ConfigError, match="5m-1m"):
        assume(spec, described(["gpu=down:5m-1m"], None, spec), {})


def test_an_option_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lanes.toml"
    file.write_text('[lanes.gpu]\nlatency = "2s"\n[lanes.flash]\ncap = 7\n')
    said = described(["gpu=latency:1"], file, campaign())
    assert (said["gpu"].latency, said["flash"].cap) == (1.0, 7)


def test_what_nobody_says_is_taken_from_history_then_from_the_spec_then_assumed() -> None:
    spec = campaign()
    past = Past(answered=4, accepted=1, latency_s=[2.0] * 4, prompt_tokens=[9.0] * 4, completion_tokens=[30.0] * 4)
    made = assume(spec, described(["flash=accept:1,down:1m-2m"], None, spec), {"gpu": past})
    gpu, flash = made["gpu"], made["flash"]
    assert (gpu.accept, gpu.source, gpu.behaviour.answer_tokens, gpu.behaviour.par) == (0.25, "4 calls", 30, 4)
    assert gpu.behaviour.latency_s == pytest.approx(2.0)
    assert (flash.accept, flash.source, flash.behaviour.rpm) == (1.0, "said", 300)
    assert flash.behaviour.down == (Window(60.0, 120.0),)
