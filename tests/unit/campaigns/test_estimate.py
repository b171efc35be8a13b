"""What a campaign is expected to take: from guesses, from history, from a probe; and who is told what."""

import json
from pathlib import Path
from typing import Any

import pytest

from agents.task import Usage
from campaigns import history
from campaigns.estimate import Estimate, estimate
from campaigns.history import past_calls
from campaigns.outlook import Probe
from campaigns.spec import CampaignSpec
from config.errors import ConfigError, SourceMissing
from config.settings import Settings

GPU = {"provider": "ollama", "host": "http://127.0.0.1:11434", "model": "q", "slots": 4}
FLASH = {"provider": "gemini", "model": "gemini-2.5-flash", "rpm": 300}
NOBODY_KNOWS = {"provider": "openai", "base_url": "https://llm.example.com/v1", "model": "new"}


def campaign(**changes: Any) -> CampaignSpec:
    whole = {"name": "x", "target": 1000, "domains": {"asm": 1}, "lanes": {"gpu": GPU, "flash": FLASH}}
    return CampaignSpec.model_validate(whole | changes)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def look(settings: Settings, spec: CampaignSpec, **probes: Probe) -> Estimate:
    return estimate(settings, spec, settings.home, probes)


def write_calls(settings: Settings, campaign: str, calls: list[dict[str, Any]]) -> Path:
    path = settings.training / campaign / "calls.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(call) + "\n" for call in calls))
    return path


def call(lane: str = "flash", model: str = "gemini-2.5-flash", **changes: Any) -> dict[str, Any]:
    row = {"lane": lane, "model": model, "domain": "asm", "verdict": "accepted", "latency_s": 2.0}
    return row | {"prompt_tokens": 300, "completion_tokens": 40, "thinking_tokens": 10} | changes


def test_every_range_has_a_low_and_a_high_end(settings: Settings) -> None:
    seen = look(settings, campaign())
    for span in (seen.calls, seen.prompt_tokens, seen.completion_tokens, seen.cost_usd, seen.hours, seen.disk_bytes):
        assert 0 < span.low <= span.high
    assert seen.calls.low >= 1000
    assert {lane.name: lane.basis for lane in seen.lanes} == {"gpu": "guess", "flash": "guess"}


def test_own_machines_cost_nothing(settings: Settings) -> None:
    seen = look(settings, campaign(lanes={"gpu": GPU}))
    assert seen.cost_usd.high == 0 and seen.worst_usd is None and not seen.may_end_early


def test_a_cap_bounds_the_cost_and_says_so(settings: Settings) -> None:
    free = look(settings, campaign(lanes={"flash": FLASH}))
    capped = look(settings, campaign(lanes={"flash": FLASH}, budget={"max_usd": 0.01}))
    assert not free.may_end_early and capped.may_end_early
    assert capped.cost_usd.high == 0.01 and capped.uncapped_usd == free.cost_usd
    assert free.worst_usd is not None and free.worst_usd >= free.cost_usd.high


def test_late_paid_lanes_get_only_what_the_free_ones_cannot_do(settings: Settings) -> None:
    at_once = look(settings, campaign())
    late = look(settings, campaign(budget={"deadline": "100h"}))
    assert at_once.cost_usd.low > 0
    assert late.cost_usd.high == 0


def test_an_unknown_price_under_a_cap_is_an_error_that_says_how_to_set_it(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"lanes.cloud: the price") as caught:
        look(settings, campaign(lanes={"cloud": NOBODY_KNOWS}, budget={"max_usd": 1}))
    assert str(settings.home / "prices.toml") in caught.value.hint
    assert look(settings, campaign(lanes={"cloud": NOBODY_KNOWS})).lanes[0].price_unknown


def test_history_narrows_the_guess(settings: Settings) -> None:
    guess = look(settings, campaign(lanes={"flash": FLASH}))
    verdicts = ["accepted"] * 90 + ["rejected"] * 10
    write_calls(settings, "older", [call(verdict=verdict) for verdict in verdicts] + [call(verdict="failed", latency_s=99.0)])
    known = look(settings, campaign(lanes={"flash": FLASH}))
    [lane] = known.lanes
    assert (lane.basis, lane.past_calls) == ("history", 100)
    assert lane.latency_s.low < 2.0 < lane.latency_s.high < 3.0
    assert lane.completion_tokens.low < 50 < lane.completion_tokens.high < 60  # thinking is paid, too
    assert 0.8 < lane.accept.low < 0.9 < lane.accept.high < 1.0
    assert known.cost_usd.high - known.cost_usd.low < guess.cost_usd.high - guess.cost_usd.low


def test_a_probe_goes_before_history(settings: Settings) -> None:
    write_calls(settings, "older", [call()] * 50)
    probe = Probe("flash", latency_s=1.0, usage=Usage(200, 20))
    [lane] = look(settings, campaign(lanes={"flash": FLASH}), flash=probe).lanes
    assert lane.basis == "probe"
    assert (lane.latency_s.low, lane.latency_s.high) == (0.5, 1.5)
    assert probe.tokens_per_s == 20.0
    [failed] = look(settings, campaign(lanes={"flash": FLASH}), flash=Probe("flash", error="no answer")).lanes
    assert failed.basis == "history"


def test_history_of_another_lane_with_the_model_is_better_than_none(settings: Settings) -> None:
    write_calls(settings, "older", [call(lane="other")] * 30 + [call(lane="flash")] * 5 + [call(domain="rom")] * 99)
    assert past_calls(settings, campaign())["flash"].answered == 35
    write_calls(settings, "newer", [call(lane="flash")] * 30)
    assert past_calls(settings, campaign())["flash"].answered == 35  # of the lane itself
    assert "gpu" not in past_calls(settings, campaign())


def test_only_whole_lines_at_the_end_of_a_file_are_read(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_calls(settings, "older", [call(latency_s=n) for n in range(100)])
    path.write_bytes(path.read_bytes() + b'not json\n{"lane": 1}\n[]\n' + b'{"torn')
    monkeypatch.setattr(history, "TAIL_BYTES", path.stat().st_size // 2)
    latencies = past_calls(settings, campaign())["flash"].latency_s
    assert 40 < len(latencies) < 60
    assert latencies[-1] == 99


def test_what_is_private_leaves_for_nobody(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.asm").write_text("LDA #$10\nSTA $20\n")
    sources = {"asm": [{"path": "*.asm", "private": True}]}
    [domain] = look(settings, campaign(sources=sources)).domains
    assert (domain.private, domain.files, domain.lanes, domain.leaves_to) == (True, 1, ["gpu"], [])
    [public] = look(settings, campaign()).domains
    assert public.leaves_to == ["Google Gemini (lane flash)"]


def test_sources_without_a_fact_are_an_error(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.asm").write_text("nothing here\n")
    with pytest.raises(SourceMissing, match="no asm fact in 1 files"):
        look(settings, campaign(sources={"asm": ["*.asm"]}))
