"""What every test lives under: a home of its own, sockets to loopback only, named reasons for what was skipped."""

import ipaddress
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

CABLES = ipaddress.ip_network("198.18.0.0/15")  # to network namespaces of a test's own; no such address is on the internet


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs the tests in the background hands SIGINT on as ignored, and so would every child that is to feel Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:  # threads that compute beside other tests wait for each other more than they compute
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.addaudithook(_loopback_only)
    hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # begun last, a slow one would run on alone


def _loopback_only(event: str, args: tuple[Any, ...]) -> None:
    """A test that reaches for the network fails at once, with the address."""
    if event != "socket.connect" or not isinstance(args[1], tuple):
        return
    host = args[1][0]
    if host == "localhost":
        return
    address = ipaddress.ip_address(host.split("%")[0])
    if not address.is_loopback and address not in CABLES:
        raise RuntimeError(f"a test tried to connect to {args[1]}")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HAFS_HOME of the test's own; no key and no Ollama of the developer's machine is ever used."""
    path = tmp_path / "home"
    monkeypatch.setenv("HAFS_HOME", str(path))
    monkeypatch.setenv("HAFS_RUNTIME", "embedded")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OLLAMA_HOST"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip a test whose external program is missing; with CI=true that is a failure."""
    for marker in request.node.iter_markers("needs"):
        for tool in marker.args:
            if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
                if os.environ.get("CI") == "true":
                    pytest.fail(f"{tool} is not installed")
                pytest.skip(f"needs {tool}")
    yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    missing: dict[str, list[str]] = {}  # program -> tests that need it
    for report in terminalreporter.stats.get("skipped", []):
        if found := re.search(r"needs (\S+)$", str(report.longrepr[2])):
            missing.setdefault(found[1], []).append(report.nodeid)
    for tool, tests in missing.items():
        terminalreporter.write_line(f"{tool} is not installed; not run: {', '.join(tests)}")
