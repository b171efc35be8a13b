"""A spec survives the way through campaign.json; durations, sources and loops are read as written."""

from pathlib import Path

import pytest

from campaigns.loop import load_loop
from campaigns.spec import CampaignSpec, LaneSpec, expand, load_campaign, source_files
from config.errors import ConfigError, SourceMissing
from config.settings import load_settings

PRESETS = Path("config/presets")


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*campaign.toml")), ids=lambda path: path.stem)
def test_a_spec_is_the_same_after_json(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    copy = tmp_path / path.name
    copy.write_text("\n".join(line for line in text.splitlines() if "zelda3" not in line))
    spec = load_campaign(copy)
    assert CampaignSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2m", 120), ("1.5h", 5400), (7, 7)])
def test_durations(text: object, seconds: float) -> None:
    assert LaneSpec.model_validate({"provider": "gemini", "model": "m", "timeout": text}).timeout == seconds


@pytest.mark.parametrize("text", ["soon", "-1s", "0s", 0])
def test_durations_that_are_none(text: object) -> None:
    with pytest.raises(ValueError):
        LaneSpec.model_validate({"provider": "gemini", "model": "m", "timeout": text})


def test_sources_are_files_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/one.asm", "a/b/two.asm", "a/three.txt"):
        (tmp_path / name).write_text("LDA #$01")
    assert len(expand("a/**/*.asm", tmp_path)) == 2
    assert len(expand("a", tmp_path)) == 3
    assert expand("a/one.asm", tmp_path) == [tmp_path / "a/one.asm"]
    assert expand("a/*.rom", tmp_path) == []


def test_a_pattern_that_matches_nothing_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    good = (PRESETS / "demo-campaign.toml").read_text()
    path.write_text(good + '\n[sources]\nasm = ["gone/*.asm"]\n')
    with pytest.raises(SourceMissing, match=r'c\.toml:19: sources\.asm: nothing matches "gone/\*\.asm"'):
        load_campaign(path)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "x.asm").write_text("LDA #$01")
    assert source_files(load_campaign(path), "asm", tmp_path) == [tmp_path / "gone" / "x.asm"]


def test_routing_and_sources_name_what_exists(tmp_path: Path) -> None:
    good = (PRESETS / "demo-campaign.toml").read_text()
    for extra, message in (
        ('[routing]\nasm = ["flash"]\n', 'names the lane "flash"; lanes are: teacher'),
        ('[routing]\nrom_hack = ["teacher"]\n', '"rom_hack" is not one of the domains: asm'),
    ):
        (tmp_path / "c.toml").write_text(f"{good}\n{extra}")
        with pytest.raises(ConfigError, match=message):
            load_campaign(tmp_path / "c.toml")


@pytest.mark.parametrize("name", ["demo", "demo-gemini"])
def test_the_demos_are_whole(name: str) -> None:
    loop = load_loop(load_settings(), PRESETS / f"{name}.toml")
    assert loop.spec.node == "local"
    assert loop.campaign.name in loop.job.data


def test_gemini_in_the_demo_is_capped() -> None:
    assert load_loop(load_settings(), PRESETS / "demo-gemini.toml").campaign.budget.max_usd == 0.10


def test_a_loop_that_names_a_missing_file_or_other_data(tmp_path: Path) -> None:
    loop = tmp_path / "loop.toml"
    loop.write_text('name = "x"\ncampaign = "gone.toml"\ntrain = "gone.toml"\n')
    with pytest.raises(ConfigError, match='loop.toml:2: campaign = "gone.toml": no such file'):
        load_loop(load_settings(), loop)
    for part in ("demo-campaign", "demo-sft"):
        text = (PRESETS / f"{part}.toml").read_text()
        (tmp_path / f"{part}.toml").write_text(text.replace('data   = ["demo"]', 'data = ["y"]'))
    loop.write_text('name = "x"\ncampaign = "demo-campaign.toml"\ntrain = "demo-sft.toml"\n')
    with pytest.raises(ConfigError, match='data does not name the campaign "demo"'):
        load_loop(load_settings(), loop)


def test_a_loop_with_an_unknown_node_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for part in ("demo-campaign", "demo-sft"):
        (tmp_path / f"{part}.toml").write_text((PRESETS / f"{part}.toml").read_text())
    loop = tmp_path / "loop.toml"
    loop.write_text('name = "x"\ncampaign = "demo-campaign.toml"\ntrain = "demo-sft.toml"\nnode = "box"\n')
    with pytest.raises(ConfigError, match='no node "box"'):
        load_loop(load_settings(), loop)


@pytest.mark.parametrize(
    ("base_url", "named", "name"),
    [
        ("https://api.openai.com/v1", "", "OPENAI_API_KEY"),
        ("https://api.openai.com/v1", "MINE", "MINE"),
        ("https://notopenai.com/v1", "", ""),
        ("https://openai.com.example.org/v1", "", ""),
        ("http://127.0.0.1:8000/v1", "", ""),
        ("http://127.0.0.1:8000/v1", "LAB_KEY", "LAB_KEY"),
    ],
)
def test_openai_s_key_goes_to_openai_alone(base_url: str, named: str, name: str) -> None:
    lane = LaneSpec.model_validate({"provider": "openai", "model": "m", "base_url": base_url, "api_key_env": named})
    assert lane.key_name == name
