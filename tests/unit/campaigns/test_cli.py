"""Every command has help, every error its exit code, and nothing heavy loads before it is needed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from campaigns.cli import main as cli
from campaigns.cli import render
from campaigns.serving import server_of
from campaigns.sync.remote import Node
from config.errors import ConfigError, HafsError, all_errors
from tests.fakes.in_process_node import InProcessNode


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


@pytest.mark.parametrize("path", list(commands(typer.main.get_command(cli.app))), ids=lambda path: " ".join(path) or "hafs")
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*path, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_becomes_its_exit_code(
    error: type[HafsError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error("what and where", hint="what to do")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == error.exit_code
    assert capsys.readouterr().err == "error: what and where\n  what to do\n"


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'paramiko'", name="paramiko")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 5
    assert 'pip install "hafs[laptop]"' in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['hafs', '--help']\n"
        "from campaigns.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'google.genai', 'ollama', 'httpx', 'aiohttp', 'paramiko', 'trainer_node'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False).returncode == 0


def test_ssh_is_loaded_without_what_it_does_not_need() -> None:
    code = "import sys, campaigns.sync.ssh; sys.exit(bool(sys.modules['invoke'] or 'invoke.context' in sys.modules))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "campaigns.cli.main", *arguments], capture_output=True, text=True, check=False
    )


def test_control_characters_of_a_model_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render.line("lab:b:x [bold]\x1b]0;title\x07\x9b31m :100:")
    render.as_json({"text": "lab:b:x"})
    shown = capsys.readouterr().out
    assert "lab:b:x [bold]" in shown and ":100:" in shown and '"lab:b:x"' in shown
    assert not any(character in shown for character in "\x1b\x07\x9b")


def test_mistakes_of_a_person_each_have_a_place_and_a_way_out(tmp_path: Path) -> None:
    good = Path("config/presets/demo-campaign.toml").read_text()
    misspelt = tmp_path / "misspelt.toml"
    misspelt.write_text(good.replace("target ", "traget "))
    answer = run("campaign", "start", str(misspelt))
    assert answer.returncode == 3
    assert 'misspelt.toml:3: unknown key "traget"' in answer.stderr
    assert 'did you mean "target"?' in answer.stderr

    sourceless = tmp_path / "sourceless.toml"
    sourceless.write_text(good + '\n[sources]\nasm = ["~/no/such/folder/**/*.asm"]\n')
    answer = run("campaign", "start", str(sourceless))
    assert answer.returncode == 4
    assert "sourceless.toml:19: sources.asm: nothing matches" in answer.stderr

    answer = run("campaign", "status", "nothing")
    assert answer.returncode == 3
    assert 'no campaign "nothing"' in answer.stderr
    assert run("campaign", "start").returncode == 2


@pytest.mark.parametrize("name", ["two words", "a:", "../up", "x" * 201])
@pytest.mark.parametrize("command", ["show", "compare X", "promote", "rollback", "delete", "export", "prune --keep 1"])
def test_what_is_no_model_s_name_is_an_error_of_two_lines(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [name if word == "X" else word for word in command.split()]
    monkeypatch.setattr(sys, "argv", ["hafs", "models", *words, name])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    told = capsys.readouterr().err
    assert caught.value.code == 3, told
    assert told.startswith("error: ") and len(told.splitlines()) == 2 and repr(name[:100])[:-1] in told


def test_a_name_that_no_model_server_can_have_is_said(tmp_path: Path) -> None:
    node = Node("box", InProcessNode(tmp_path / "node").dial)
    with (
        pytest.raises(ConfigError, match="can have no model 'nul:1b': .*Windows does not keep") as caught,
        server_of(node, model="nul:1b"),
    ):
        """It is not reached."""
    assert "llama3.2:1b" in caught.value.hint
