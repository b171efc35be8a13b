from pathlib import Path

import pytest

from config.errors import StoreError
from trainer_node import environments
from trainer_node.environments import remove_unused, unused


def test_what_a_command_line_names_stays(tmp_path: Path) -> None:
    made = [tmp_path / "env" / name for name in ("0.1.0-a", "0.1.0-ab", "0.2.0-b", "0.3.0-c", "0.4.0-d")]
    in_use = [
        str(made[1] / "bin" / "python"),
        f'"{made[2]}/bin/python" "-P" "-m" "trainer_node.cli"',  # one line of a unit file
        str(made[3]),
    ]
    assert unused(made, in_use) == [made[0], made[4]]


def test_only_environments_are_removed(tmp_path: Path) -> None:
    old = tmp_path / "env" / "0.1.0-a"
    (old / "bin").mkdir(parents=True)
    (tmp_path / "env" / "note.txt").write_text("mine")
    (tmp_path / "models").mkdir()
    assert remove_unused(tmp_path) == ["0.1.0-a"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["env", "models", "note.txt"]
    assert remove_unused(tmp_path / "nothing") == []


def test_what_is_half_gone_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill in the middle leaves it: the next setup of the same version makes it anew."""
    old = tmp_path / "env" / "0.1.0-a"
    (old / "bin").mkdir(parents=True)
    (old / "environment.json").write_text("{}")

    def killed(path: Path) -> None:
        raise OSError(5, "cut off", str(path))

    monkeypatch.setattr("trainer_node.environments.shutil.rmtree", killed)
    with pytest.raises(StoreError, match="cut off"):
        remove_unused(tmp_path)
    assert [path.name for path in old.iterdir()] == ["bin"]


def test_a_process_is_seen(tmp_path: Path) -> None:
    assert any("python" in line for line in environments._command_lines())
