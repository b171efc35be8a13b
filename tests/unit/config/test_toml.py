"""Mistakes in a TOML file are reported with file, line, key and the nearest valid key."""

from pathlib import Path

import pytest

from campaigns.spec import CampaignSpec
from config.contracts.job import JobSpec
from config.errors import ConfigError
from config.toml import line_of, load_toml

GOOD = """name = "pilot"
target = 10
domains = { asm = 1.0 }

[lanes.gpu]
provider = "ollama"
host = "http://127.0.0.1:11434"
model = "m"
"""


def refused(tmp_path: Path, text: str) -> ConfigError:
    path = tmp_path / "spec.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_toml(path, CampaignSpec)
    return caught.value


def test_a_good_file_loads(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(GOOD)
    assert load_toml(tmp_path / "spec.toml", CampaignSpec).lanes["gpu"].model == "m"


def test_a_misspelt_key_at_the_top(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace("target", "taget"))
    assert f'{tmp_path}/spec.toml:2: unknown key "taget"' in str(error)
    assert error.hint == 'did you mean "target"?'


def test_a_misspelt_key_in_a_table_that_the_person_named(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace("model =", "modell ="))
    assert 'spec.toml:8: unknown key "lanes.gpu.modell"' in str(error)
    assert error.hint == 'did you mean "model"?'


def test_a_missing_key_names_its_table(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace('provider = "ollama"\n', ""))
    assert 'spec.toml:5: the key "lanes.gpu.provider" is missing' in str(error)


def test_a_wrong_value_is_shown(tmp_path: Path) -> None:
    assert "spec.toml:2: target: Input should be greater than or equal to 1 (got 0)" in str(
        refused(tmp_path, GOOD.replace("10", "0"))
    )


def test_a_rule_between_keys(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD + "rpm = 3\n")
    assert "spec.toml:5: lanes.gpu: rpm does not belong to a lane with provider = 'ollama'" in str(error)


def test_what_is_no_toml_says_where(tmp_path: Path) -> None:
    assert "not valid TOML" in str(refused(tmp_path, "name = \n"))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_toml(Path("nowhere.toml"), CampaignSpec)


def test_line_of_finds_inline_and_nested_keys() -> None:
    text = 'a = 1\n[b]\nc.d = 2\n[b.e]\n"f" = 3\n'
    assert [line_of(text, keys) for keys in (["a"], ["b", "c", "d"], ["b", "e", "f"], ["b", "x"], ["x"])] == [1, 3, 5, 2, 1]


@pytest.mark.parametrize("path", sorted(Path("config/presets").glob("*.toml")), ids=lambda path: path.name)
def test_every_preset_loads(path: Path) -> None:
    from campaigns.spec import LoopSpec
    from config.settings import NodesFile

    kinds = {"campaign": CampaignSpec, "sft": JobSpec, "dpo": JobSpec, "nodes": NodesFile}
    load_toml(path, kinds.get(path.stem.rsplit("-")[-1], LoopSpec))


def test_the_line_of_an_entry_of_an_array_of_tables() -> None:
    text = '[[price]]\nmodel = "a"\n\n[[price]]\nmodel = "b"\n[[other]]\nmodel = "c"\n'
    assert [line_of(text, ["price", str(n), "model"]) for n in (0, 1)] == [2, 5]
    assert line_of(text, ["price", "1", "input"]) == 4
    assert line_of(text, ["other", "0", "model"]) == 7
