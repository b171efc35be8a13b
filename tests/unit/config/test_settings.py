"""Keys of model servers: the environment wins, the file is private, what is no key is refused without being repeated."""

import os
import stat
from pathlib import Path

import pytest

from config.errors import ConfigError
from config.settings import load_settings


def test_the_environment_wins_over_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    assert settings.key("LAB_KEY") == ""
    settings.keep_key("LAB_KEY", 'from"file\\')
    settings.keep_key("OTHER_KEY", "other")
    assert settings.key("LAB_KEY") == 'from"file\\'
    assert settings.key("OTHER_KEY") == "other"
    assert settings.key("") == ""
    monkeypatch.setenv("LAB_KEY", "from-env")
    assert settings.key("LAB_KEY") == "from-env"


@pytest.mark.skipif(os.name != "posix", reason="modes are a POSIX matter")
def test_the_file_is_for_its_owner_only_from_the_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = os.replace

    def replace(source: str, target: Path) -> None:
        seen.append(stat.S_IMODE(os.stat(source).st_mode))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    os.umask(os.umask(0))
    load_settings().keep_key("LAB_KEY", "k")
    load_settings().keep_key("LAB_KEY", "l")
    assert seen == [0o600, 0o600]
    assert stat.S_IMODE(load_settings().keys_file.stat().st_mode) == 0o600


@pytest.mark.parametrize(("name", "value"), [("A KEY", "x"), ("LAB_KEY", "two words"), ("LAB_KEY", "s\nx = 1"), ("LAB_KEY", "")])
def test_what_is_no_key_is_refused_and_not_repeated(home: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings().keep_key(name, value)
    assert not value or value not in str(caught.value)
    assert not load_settings().keys_file.exists()
