"""`hafs init`: what is found becomes a spec that loads; a key stays private; no file is overwritten."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from campaigns import starter
from campaigns.cli import main as cli
from campaigns.spec import load_campaign
from campaigns.starter import Answers, Found, campaign_name, look_around, spec_text, write_first
from config.errors import ConfigError
from config.settings import load_settings

BOTH = Answers("mine", "asm", "http://127.0.0.1:11434", 'odd"model', True, 2.5, 50)
HERE = Found("http://h:1", True, ["bge-m3", "nomic-embed-text:latest", "qwen3:4b"], True, ["asm"])


def test_answers_become_a_spec_that_loads(tmp_path: Path) -> None:
    spec = load_campaign(write_first(tmp_path / "new" / "folder", spec_text(BOTH)))
    assert (spec.name, spec.target, spec.budget.max_usd) == ("mine", 50, 2.5)
    assert spec.lanes["local"].model == 'odd"model'
    assert spec.lanes["flash"].provider == "gemini"


def test_a_file_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    path = write_first(tmp_path, "mine")
    with pytest.raises(ConfigError, match="is there already"):
        write_first(tmp_path, spec_text(BOTH))
    assert path.read_text() == "mine"


def test_defaults_prefer_a_model_that_can_chat() -> None:
    answers = HERE.defaults("x")
    assert (answers.ollama_host, answers.ollama_model, answers.gemini) == ("http://h:1", "qwen3:4b", True)


def test_without_a_server_the_embedded_model_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "find_spec", lambda name: name)
    nothing = replace(HERE, models=[], gemini_key=False)
    assert nothing.defaults("x").ollama_host == "auto"
    assert "gguf" in spec_text(nothing.defaults("x"))
    monkeypatch.setattr(starter, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="no model server"):
        spec_text(nothing.defaults("x"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"name": "../x"}, "cannot name"), ({"domain": "no"}, "no domain"), ({"target": 0}, "target"), ({"max_usd": -1}, "max_usd")],
)
def test_wrong_answers_are_said(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spec_text(replace(BOTH, **wrong))  # type: ignore[arg-type]


def test_looking_around_finds_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    found = look_around(load_settings())
    assert (found.ollama_up, found.models, found.gemini_key, found.domains) == (False, [], False, ["asm"])
    load_settings().keep_key("GOOGLE_API_KEY", "k")
    assert look_around(load_settings()).gemini_key


def test_a_folder_names_its_campaign() -> None:
    assert campaign_name(Path("/x/my first one!")) == "my-first-one"
    assert campaign_name(Path("/")) == "first"


def test_a_conversation_writes_the_spec_and_keeps_the_key(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    # name, domain, no Ollama, key, budget, target
    told = CliRunner().invoke(cli.app, ["init", str(tmp_path / "lab")], input="\n\nnone\nAIzaPLANTED\n0.5\n30\n")
    assert told.exit_code == 0, told.output
    spec = load_campaign(tmp_path / "lab" / "campaign.toml")
    assert (spec.name, spec.target, spec.budget.max_usd, list(spec.lanes)) == ("lab", 30, 0.5, ["flash"])
    assert "campaign check" in told.output
    assert "AIzaPLANTED" not in told.output.replace("\n", "")
    assert load_settings().key("GEMINI_API_KEY") == "AIzaPLANTED"
    if os.name == "posix":
        assert stat.S_IMODE((home / "keys.toml").stat().st_mode) == 0o600
