"""What is pure about setting up a node: the wheel, the choice of torch, the words that cross every shell, the node's script."""

import ast
import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from campaigns.nodes_file import add_node
from campaigns.sync import bootstrap
from campaigns.sync import setup as node_setup
from campaigns.sync.setup import CPU_TORCH, Options, Progress, option_words, python_beside, remote_words, torch_arguments
from campaigns.sync.wheel import PACKAGES, own_wheel
from config.contracts.wire import DoctorResult
from config.errors import ConfigError, NodeError
from config.settings import NodeSettings, Settings, load_settings
from tests.fakes.waiting import wait_for


def test_the_wheel_holds_what_runs_here() -> None:
    wheel = own_wheel()
    with zipfile.ZipFile(BytesIO(wheel.data)) as archive:
        names = archive.namelist()
        assert archive.testzip() is None and len(set(names)) == len(names)
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        for name, digest, size in csv.reader(StringIO(archive.read(record).decode())):
            if name != record:
                data = archive.read(name)
                found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                assert (digest, int(size)) == (f"sha256={found}", len(data))
        assert "Provides-Extra: node" in archive.read(record.replace("RECORD", "METADATA")).decode()
        assert "hafs-node = trainer_node.cli:main" in archive.read(record.replace("RECORD", "entry_points.txt")).decode()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == set(PACKAGES)
    assert {"config/errors.py", "config/presets/demo.toml", "campaigns/sync/bootstrap.py"} <= set(names)
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)


def test_the_same_files_are_the_same_wheel() -> None:
    assert own_wheel() == own_wheel()


@pytest.mark.parametrize(
    ("platform", "cuda", "sources", "arguments"),
    [
        ("linux", "", [], ["--extra-index-url", CPU_TORCH]),
        ("linux", "12.8", [], []),
        ("win32", "13.1", [], ["--index-url", "https://download.pytorch.org/whl/cu130"]),
        ("win32", "12.9", [], ["--index-url", "https://download.pytorch.org/whl/cu128"]),
        ("win32", "12.6", [], ["--index-url", "https://download.pytorch.org/whl/cu126"]),
        ("win32", "12.10", [], ["--index-url", "https://download.pytorch.org/whl/cu128"]),
        ("win32", "", [], ["--extra-index-url", CPU_TORCH]),
        ("darwin", "", [], []),
        ("win32", "13.1", ["global.no-index='true'"], []),
    ],
)
def test_the_torch_build_fits_the_machine(platform: str, cuda: str, sources: list[str], arguments: list[str]) -> None:
    found, why = torch_arguments(platform, cuda, sources)
    assert found == arguments and why


def test_a_driver_too_old_for_any_build_is_said() -> None:
    with pytest.raises(NodeError, match="can do CUDA 11.8") as refused:
        torch_arguments("win32", "11.8", [])
    assert "update the driver" in refused.value.hint


def test_words_that_every_shell_leaves_alone() -> None:
    words = (r"C:\Users\me\.context\node\env\0.1.0-1a2b3c4d\Scripts\hafs-node.exe", "doctor", "--root", "D:/hafs")
    assert remote_words(*words) == " ".join(words)


@pytest.mark.parametrize(
    "word", ["C:/Users/First Last/x", 'a"b', "a'b", "$HOME", "%PATH%", "a;b", "a&b", "a|b", "`x`", "", "(x)", "a\nb"]
)
def test_words_that_some_shell_would_take_apart(word: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        remote_words(word)


# the node's Python -----------------------------------------------------------------------------------------------------


class Shell:
    """Answers `NAME -` with what the Python of that name says of itself: version, and whether it can make environments."""

    def __init__(self, **pythons: tuple[list[int], bool]) -> None:
        self.name, self._pythons = "box", pythons
        self.ran = list[str]()

    def run(self, command: str, stdin: bytes, on_line: Callable[[str], None], silence_s: float) -> tuple[int, str]:
        self.ran.append(command)
        found = self._pythons.get(command.split()[0])
        if found is None:
            return 127, "not found"
        if b"find_spec" not in stdin:
            return 1, "the script itself is another test's"
        on_line("Welcome to box!")  # a start-up file that talks
        on_line(bootstrap.MARK + json.dumps([f"/usr/bin/{command.split()[0]}", *found]))
        return 0, ""


def set_up_over(shell: Shell, monkeypatch: pytest.MonkeyPatch, python: str | None = None) -> NodeError:
    settings = load_settings()
    add_node(settings, "box", NodeSettings(host="10.0.0.7"))
    monkeypatch.setattr(node_setup, "open_shell", lambda *_: nullcontext(shell))
    with pytest.raises(NodeError) as refused:
        node_setup.setup(settings, "box", Options(python=python), Progress(lambda _: None, lambda _: None))
    assert settings.node("box").command == "hafs-node", "nothing in use was changed"
    return refused.value


def test_pythons_that_will_not_do_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(python3=([3, 9, 2], True), **{"python3.12": ([3, 12, 1], False), "python": ([2, 7, 18], True)})
    error = set_up_over(shell, monkeypatch)
    assert "python3 is 3.9.2" in str(error) and "python3.12 (3.12.1) cannot make environments" in str(error)
    assert "apt install python3-venv" in str(error) and "python is 2.7.18" in str(error) and "--python" in error.hint


def test_a_node_without_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no /opt/py/bin/python3 answers" in str(set_up_over(Shell(), monkeypatch, "/opt/py/bin/python3"))


def test_the_first_python_that_will_do_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(**{"python3": ([3, 9, 2], True), "python3.12": ([3, 12, 1], True), "python3.11": ([3, 11, 1], True)})
    shell._pythons["/usr/bin/python3.12"] = ([3, 12, 1], True)
    assert "the script itself is another test's" in str(set_up_over(shell, monkeypatch))
    assert shell.ran == ["python3 -", "python3.13 -", "python3.12 -", "/usr/bin/python3.12 -"]


class Account(Shell):
    """One Python that will do; the script's steps, doctor and service answer as told. `steps` is what was asked of the script."""

    def __init__(self, answers: dict[str, dict[str, Any]] | None = None, *, call: str = "python3", doctor: Any = ()) -> None:
        super().__init__(**{call: ([3, 12, 1], True)})
        self._path = f"/usr/bin/{call}"
        self._answers = {**HEALTHY, **(answers or {})}
        self._doctor = [{"name": "Python", "ok": True, "detail": "3.12.1"}, *doctor]
        self.steps = list[dict[str, Any]]()

    def at(self, path: str) -> "Account":
        self._path = path
        return self

    def run(self, command: str, stdin: bytes, on_line: Callable[[str], None], silence_s: float) -> tuple[int, str]:
        self.ran.append(command)
        program, *words = command.split()
        if words[:1] != ["-"]:
            text = {"doctor": json.dumps(self._doctor, indent=1), "install": "unit", "prune": "removed: nothing"}[words[0]]
            for line in text.splitlines():
                on_line(line)
            return 0, ""
        if program not in (*self._pythons, self._path):
            return 127, "not found"
        if b"def main" not in stdin:
            on_line(bootstrap.MARK + json.dumps([self._path, [3, 12, 1], True]))
            return 0, ""
        step = json.loads(ast.literal_eval(stdin.decode().rpartition("main(")[2].strip()[:-1]))
        self.steps.append(step)
        on_line(bootstrap.MARK + json.dumps({"done": self._answers[step["action"]]}))
        return 0, ""


ENVIRONMENT = "/home/me/.context/node/env/0.1.0-1a2b3c4d"
HEALTHY: dict[str, dict[str, Any]] = {
    "recall": {},
    "look": {"platform": "linux", "root": "/home/me/.context/node", "cuda": ""},
    "make": {"env": ENVIRONMENT, "whole": False, "pip_sources": []},
    "pip": {},
    "finish": {"command": f"{ENVIRONMENT}/bin/hafs-node"},
}


class Answering:
    """What `connect` gives once the node is set up."""

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def call(self, verb: Any, args: Any, deadline_s: float = 60) -> DoctorResult:
        return DoctorResult(checks=[])


def set_up(shell: Account, monkeypatch: pytest.MonkeyPatch, command: str = "hafs-node") -> Settings:
    settings = load_settings()
    if "box" not in settings.nodes():
        add_node(settings, "box", NodeSettings(host="10.0.0.7", command=command))
    monkeypatch.setattr(node_setup, "open_shell", lambda *_: nullcontext(shell))
    monkeypatch.setattr(node_setup, "connect", lambda *_: Answering())
    node_setup.setup(settings, "box", Options(), Progress(lambda _: None, lambda _: None))
    return settings


def test_a_python_whose_path_has_a_blank_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Account(call="python").at(r"C:\Program Files\Python312\python.exe")
    settings = set_up(shell, monkeypatch)
    assert settings.node("box").command == f"{ENVIRONMENT}/bin/hafs-node"
    assert not any("Program Files" in command for command in shell.ran)


def test_a_root_that_no_shell_can_call_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Account({"look": {**HEALTHY["look"], "platform": "win32", "root": r"C:\Users\First Last\.context\node"}})
    with pytest.raises(ConfigError, match="First Last") as refused:
        set_up(shell, monkeypatch)
    assert 'root = "D:/hafs"' in refused.value.hint
    assert [step["action"] for step in shell.steps] == ["recall", "look"]


def test_what_the_last_setup_was_told_is_read_by_the_python_that_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one named with --python may be the only one there that will do."""
    told = {"python": "/opt/py/bin/python3", "pip_args": ["--no-compile"], "torch_args": None, "service": False}
    shell = Account({"recall": told}, call="/opt/py/bin/python3").at(f"{ENVIRONMENT}/bin/python")
    set_up(shell, monkeypatch, command=f"{ENVIRONMENT}/bin/hafs-node")
    assert shell.ran[:3] == [f"{ENVIRONMENT}/bin/python -", f"{ENVIRONMENT}/bin/python -", "/opt/py/bin/python3 -"]
    assert all("--no-compile" in step["arguments"] for step in shell.steps if step["action"] == "pip")
    assert shell.steps[-1]["record"] == told and not any(" install" in command for command in shell.ran)


def test_a_service_that_is_down_is_mended_by_the_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    down = {"name": "service", "ok": False, "detail": "hafs-node.service is failed", "hint": "hafs-node install starts it anew"}
    shell = Account(doctor=[down])
    assert set_up(shell, monkeypatch).node("box").command == f"{ENVIRONMENT}/bin/hafs-node"
    assert any(command.endswith(" install") for command in shell.ran)
    other = {"name": "torch", "ok": False, "detail": "it does not load", "hint": ""}
    with pytest.raises(NodeError, match="torch: it does not load"):
        set_up(Account(doctor=[down, other]), monkeypatch)


def test_a_driver_that_came_later_gets_an_environment_with_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    without, with_card = Account(), Account({"look": {**HEALTHY["look"], "cuda": "12.8"}})
    for shell in (without, with_card):
        set_up(shell, monkeypatch)
    names = [next(step["name"] for step in shell.steps if step["action"] == "make") for shell in (without, with_card)]
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, None),
        ("", ()),
        ("--no-index --find-links D:\\wheels", ("--no-index", "--find-links", "D:\\wheels")),
        ("--find-links 'D:/my wheels' # x", ("--find-links", "D:/my wheels", "#", "x")),
    ],
)
def test_options_of_pip_in_one_text(text: str | None, words: tuple[str, ...] | None) -> None:
    assert option_words(text) == words


def test_an_open_quote_is_said() -> None:
    with pytest.raises(ConfigError, match="No closing quotation"):
        option_words("--find-links 'x")


@pytest.mark.parametrize(
    ("command", "python"),
    [
        ("hafs-node", ""),
        ("/x/env/a/bin/hafs-node", "/x/env/a/bin/python"),
        (r"D:\hafs\env\a\Scripts\hafs-node.exe", r"D:\hafs\env\a\Scripts\python.exe"),
        ("/x/run-hafs", ""),
    ],
)
def test_the_python_beside_a_command(command: str, python: str) -> None:
    assert python_beside(command) == python


def test_this_machine_needs_no_setup() -> None:
    with pytest.raises(ConfigError, match="has its hafs already"):
        node_setup.setup(load_settings(), "local", Options(), Progress(lambda _: None, lambda _: None))


# the script on the node ------------------------------------------------------------------------------------------------


def ask(action: str, home: Path, **arguments: Any) -> dict[str, Any]:
    """As it goes over the wire: the file and a call, on stdin of a Python that knows nothing of hafs."""
    source = Path(bootstrap.__file__).read_text()
    call = f"\n\nmain({json.dumps({'action': action, **arguments})!r})\n"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HAFS_")}
    done = subprocess.run(
        [sys.executable, "-I", "-"],
        input=(source + call).encode("ascii"),
        capture_output=True,
        timeout=100,
        env=environment | {"HOME": str(home)},
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1].decode().removeprefix(bootstrap.MARK))
    return answer


def test_it_finds_the_nodes_folder_as_the_node_does(tmp_path: Path) -> None:
    found = ask("look", tmp_path, root="")["done"]
    assert found["root"] == str(tmp_path / ".context" / "node") and found["platform"] == sys.platform
    assert ask("look", tmp_path, root="~/x")["done"]["root"] == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_no_setup_made_has_nothing_to_recall(tmp_path: Path) -> None:
    assert ask("recall", tmp_path, command="hafs-node") == {"done": {}}
    environment = tmp_path / "env" / "bin"
    environment.mkdir(parents=True)
    (environment.parent / "environment.json").write_text('{"service": false}')
    assert ask("recall", tmp_path, command=str(environment / "hafs-node")) == {"done": {"service": False}}


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_record_that_a_power_cut_has_torn_is_none(tmp_path: Path, text: str) -> None:
    environment = tmp_path / "env" / "bin"
    environment.mkdir(parents=True)
    (environment.parent / "environment.json").write_text(text)
    assert ask("recall", tmp_path, command=str(environment / "hafs-node")) == {"done": {}}


def environment_at(folder: Path) -> Path:
    """As `venv` makes one, without pip, which takes seconds."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    return folder


def test_a_pip_that_fails_leaves_its_words_and_nothing_else(tmp_path: Path) -> None:
    env = environment_at(tmp_path / "env" / "a")
    (env / "hafs.whl").write_bytes(b"x" * 1000)
    failed = ask("pip", tmp_path, env=str(env), arguments=["torch"])["failed"]
    assert "No module named pip" in failed and str(env) in failed and "status 1" in failed
    assert [path.name for path in env.iterdir()] == ["setup.log"], "half of torch would fill the disk"


def slow_pip(env: Path, seconds: float) -> None:
    """A pip that says when it began, and works for so long."""
    (package,) = env.glob("lib/*/site-packages")
    (package / "pip.py").write_text(f"import pathlib, time; pathlib.Path({str(env / 'began')!r}).touch(); time.sleep({seconds})")


def script(action: str, patience_s: float, **arguments: Any) -> bytes:
    source = Path(bootstrap.__file__).read_text()
    hurried = source.replace("PATIENCE_S = 15.0", f"PATIENCE_S = {patience_s}").replace("ALIVE_S = 5.0", "ALIVE_S = 0.1")
    return f"{hurried}\n\nmain({json.dumps({'action': action, **arguments})!r})\n".encode("ascii")


@pytest.mark.skipif(os.name == "nt", reason="an orphan keeps its parent's lock")
def test_two_setups_do_not_work_at_once_even_where_the_first_was_killed(tmp_path: Path) -> None:
    env = environment_at(tmp_path / "node" / "env" / "a")
    slow_pip(env, 600)
    argv = [sys.executable, "-I", "-"]
    first = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert first.stdin is not None
    first.stdin.write(script("pip", 1, env=str(env), arguments=["x"]))
    first.stdin.close()
    wait_for("pip", lambda: (env / "began").exists())
    (pip,) = psutil.Process(first.pid).children()
    make = script("make", 0.3, root=str(tmp_path / "node"), name="a", wheel="w", data="")
    try:
        for attempt in range(2):
            done = subprocess.run(argv, input=make, capture_output=True, timeout=60, check=True)
            assert b"another setup works there" in done.stdout and (env / "began").exists(), attempt
            first.kill()  # and pip goes on
            first.wait(10)
    finally:
        first.kill()
        first.wait(10)
        pip.kill()
    wait_for("end", lambda: not pip.is_running() or pip.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_pip_whose_laptop_has_gone_ends(tmp_path: Path) -> None:
    env = environment_at(tmp_path / "node" / "env" / "a")
    slow_pip(env, 600)
    argv = [sys.executable, "-I", "-"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(script("pip", 1, env=str(env), arguments=["x"]))
        child.stdin.close()
        wait_for("pip", lambda: (env / "began").exists())
        (pip,) = psutil.Process(child.pid).children()
        child.stdout.close()  # as sshd does when the connection is lost
        try:
            assert child.wait(30) != 0
            assert not pip.is_running()
        finally:
            child.kill()
            psutil.wait_procs([pip], timeout=0.1)
    assert [path.name for path in env.iterdir()] == ["setup.log"]


def test_an_environment_is_whole_only_once_pip_has_made_the_command(tmp_path: Path) -> None:
    bin_folder = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    bin_folder.mkdir(parents=True)
    assert "pip did not make it" in ask("finish", tmp_path, env=str(tmp_path / "env"), record={})["failed"]
    command = bin_folder / ("hafs-node.exe" if os.name == "nt" else "hafs-node")
    command.write_text("")
    assert ask("finish", tmp_path, env=str(tmp_path / "env"), record={"a": 1})["done"] == {"command": str(command)}
    assert json.loads((tmp_path / "env" / "environment.json").read_text()) == {"a": 1}


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in ask("make", tmp_path, root=str(tmp_path / "file"), name="x", wheel="w", data="")["failed"]


def test_a_driver_is_asked_for_its_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "| NVIDIA-SMI 570.86  Driver Version: 570.86  CUDA Version: 12.8  |"\n')
    smi.chmod(0o755)
    monkeypatch.setattr(bootstrap, "NVIDIA_SMI", (str(smi),))
    assert bootstrap.cuda_version() == "12.8"
    smi.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert bootstrap.cuda_version() == ""
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(bootstrap, "DRIVER_S", 0.1)
    with pytest.raises(OSError, match="driver does not answer"):
        bootstrap.cuda_version()
    monkeypatch.setattr(bootstrap, "NVIDIA_SMI", (str(tmp_path / "none"),))
    assert bootstrap.cuda_version() == ""
