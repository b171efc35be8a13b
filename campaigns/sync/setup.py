"""hafs onto a node: from an account with sshd and Python to a node that trains, and from one version to the next.

Each version has an environment of its own, named by what is in it. It is made beside the one in use, and nodes.toml and the
service change to it only after its doctor is content; so a setup that fails, or is cut off anywhere, changes nothing in use and
is run again. A job goes on in the environment it was started in.
"""

import base64
import json
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from pydantic import TypeAdapter, ValidationError

from campaigns.nodes_file import change_node
from campaigns.sync.bootstrap import MARK
from campaigns.sync.remote import connect, hafs_version
from campaigns.sync.ssh import SshShell, open_shell
from campaigns.sync.wheel import Wheel, own_wheel
from config.contracts.base import content_id
from config.contracts.wire import DOCTOR, STATUS, DoctorArgs, DoctorCheck, JobArgs
from config.errors import ConfigError, NodeError
from config.settings import LOCAL, Settings

PYTHONS = (
    *("python3", "python3.13", "python3.12", "python3.11", "python", "py"),
    *("/opt/homebrew/bin/python3", "/usr/local/bin/python3"),  # not in the PATH of a command over ssh
)
OLDEST = (3, 11)
MENDED_NEXT = "service"  # the one check of the doctor that is no reason to stop: the step after it installs the service
WORD = re.compile(r"[A-Za-z0-9_./:\\~-]+")
SILENCE_S = 90.0  # of a script, which says every few seconds that it lives
DOCTOR_S = 240.0  # it loads torch, once, on a disk that may be slow
SERVICE_S = 600.0  # a service manager that starts, a hundred thousand files that go
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
CUDA_TORCH = (((13, 0), "cu130"), ((12, 8), "cu128"), ((12, 6), "cu126"))  # what pytorch.org builds, the newest first
LOOK_AT_PYTHON = """
import json, sys
from importlib.util import find_spec
print("%s" + json.dumps([sys.executable, sys.version_info[:3], find_spec("ensurepip") is not None]))
"""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a person may choose. None: what the last setup of this node was told, else what fits the machine.

    `pip_args` go to every call of pip, `torch_args` to the one that installs torch.
    """

    python: str | None = None
    pip_args: tuple[str, ...] | None = None
    torch_args: tuple[str, ...] | None = None
    service: bool | None = None


@dataclass(frozen=True)
class Progress:
    """`step` is said once a step is done; `working` as often as there is news of one that takes long."""

    step: Tell
    working: Tell


def setup(
    settings: Settings, name: str, options: Options, progress: Progress, extras: Sequence[str] = ("node", "runtime")
) -> list[DoctorCheck]:
    """Give node `name` the hafs of this machine and make it the one in use. Again: only what is missing.

    Returns:
        What the node's doctor says of it, all of it ok.

    Raises:
        NodeError: no usable Python, pip failed, or the doctor found something; what was in use still is.
        ConfigError: the node is `local`, or a path there has a blank or a quote in it.
        NodeUnreachable, HostKeyRefused: as `connect`.
    """
    if name == LOCAL:
        raise ConfigError("this machine has its hafs already", hint='to train here: pip install "hafs[node,runtime]"')
    with open_shell(settings, name) as shell:
        made = _Setup(settings, shell, options, progress, tuple(extras))
        command = made.environment()
        made.require_healthy(command)
        made.service(command)
        if settings.node(name).command != command:
            change_node(settings, name, command=command)
            progress.step(f"nodes.toml: command = {command}")
        made.prune(command)
    with connect(settings, name) as node:
        node.call(STATUS, JobArgs())  # work that is owed gets its daemon back
        return node.call(DOCTOR, DoctorArgs(time=time.time()), DOCTOR_S).checks


def option_words(text: str | None) -> tuple[str, ...] | None:
    r"""The options of pip in one text: blanks part them, quotes keep blanks, and a backslash is one, as in D:\wheels.

    Raises:
        ConfigError: a quote is left open.
    """
    if text is None:
        return None
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        return tuple(lexer)
    except ValueError as error:
        raise ConfigError(f"options of pip: {text}: {error}", hint="quotes come in pairs") from error


def torch_arguments(platform: str, cuda: str, pip_sources: Sequence[str]) -> tuple[list[str], str]:
    """pip's options for the torch build that fits, and why. A node whose pip has sources of its own knows better.

    Args:
        platform: sys.platform there.
        cuda: the newest CUDA its driver can run; empty: no NVIDIA GPU.
        pip_sources: index and link settings of its pip.
    """
    if pip_sources:
        return [], "from the sources of the node's own pip configuration"
    if platform == "darwin":
        return [], "the one build for macOS"
    if not cuda:
        return ["--extra-index-url", CPU_TORCH], "for the processor: no NVIDIA driver was found"
    if platform != "win32":
        return [], f"with CUDA; the driver can do {cuda}"
    driver = tuple(map(int, cuda.split(".")))
    build = next((name for version, name in CUDA_TORCH if driver >= version), None)
    if build is None:
        raise NodeError(
            f"the NVIDIA driver there can do CUDA {cuda}, torch needs 12.6",
            hint="update the driver, or choose a build yourself: --torch-args='--index-url …'",
        )
    return ["--index-url", f"https://download.pytorch.org/whl/{build}"], f"{build}; the driver can do CUDA {cuda}"


def python_beside(command: str) -> str:
    """The Python of the environment whose hafs-node `command` is; empty where it names none."""
    found = re.fullmatch(r"(.*[/\\])hafs-node(\.exe)?", command)
    return f"{found[1]}python{found[2] or ''}" if found else ""


def remote_words(*words: str) -> str:
    """A command line that sh, cmd and PowerShell read alike. Raises ConfigError for a word that one of them would take apart."""
    for word in words:
        if not WORD.fullmatch(word):
            raise ConfigError(
                f"{word!r} cannot be called on every system: it has a blank or a special character",
                hint='a folder: set root = "D:/hafs", or another plain folder of the node, in nodes.toml, and run setup again; '
                "a program of Windows: its short name, such as C:/PROGRA~1/Python312/python.exe (dir /x shows it)",
            )
    return " ".join(words)


class _Setup:
    """The steps, in their order, on one open connection."""

    def __init__(
        self, settings: Settings, shell: SshShell, options: Options, progress: Progress, extras: tuple[str, ...]
    ) -> None:
        self._node = settings.node(shell.name)
        self._shell, self._progress, self._extras = shell, progress, extras
        self._options = options
        self._python = ""

    def environment(self) -> str:
        """Find a Python, make an environment, install. Returns the hafs-node in it."""
        begin = time.monotonic()
        self._recall()
        version = self._find_python([self._options.python] if self._options.python else PYTHONS)
        found = self._script("look", root=self._node.root)
        remote_words(found["root"])  # what is to be called will lie below it: said now, not after pip has worked for minutes
        self._done(f"Python {version} at {self._python}, {found['platform']}, root {found['root']}", begin)
        begin, wheel = time.monotonic(), own_wheel()
        made = self._script(
            "make",
            root=self._node.root,
            name=self._name(wheel, version, found),
            wheel=wheel.name,
            data=base64.b64encode(wheel.data).decode(),
        )
        if made["whole"]:
            self._done(f"hafs {hafs_version()} is there already: {made['env']}", begin)
        else:
            self._done(f"environment {made['env']}", begin)
            self._install(made, found, wheel)
        return str(self._script("finish", env=made["env"], record=self._record())["command"])

    def require_healthy(self, command: str) -> None:
        """Raises NodeError with what the new environment's doctor finds wrong."""
        begin, lines = time.monotonic(), list[str]()
        words = remote_words(command, "doctor", "--json", *self._root())
        _, stderr = self._shell.run(words, b"", lines.append, DOCTOR_S)
        try:
            text = "\n".join(lines[lines.index("[") :])  # a start-up file of the shell may have said something before
            checks = TypeAdapter(list[DoctorCheck]).validate_json(text)
        except (ValueError, ValidationError) as error:
            raise self._failed(f"{command} doctor does not work", stderr or "\n".join(lines)) from error
        if wrong := [check for check in checks if not check.ok and check.name != MENDED_NEXT]:
            said = "; ".join(f"{check.name}: {check.detail} ({check.hint})" for check in wrong)
            raise NodeError(
                f"{self._shell.name} is not ready: {said}",
                hint=f"mend it, then again: hafs nodes setup {self._shell.name}. What was in use before still is. Where the "
                f"environment itself is damaged, remove its folder there: {command} is in it",
            )
        self._done(f"doctor: {len(checks)} checks, nothing in the way", begin)

    def service(self, command: str) -> None:
        """Where the service cannot be installed the node works all the same, while somebody asks it to: said, not raised."""
        if self._options.service is False:
            self._progress.step("service: none, as you wish; a daemon starts with the next job")
            return
        begin, lines = time.monotonic(), list[str]()
        status, stderr = self._shell.run(remote_words(command, "install", *self._root()), b"", lines.append, SERVICE_S)
        said = "; ".join(lines) if status == 0 else f"not installed: {stderr}"
        self._done(f"service: {said}", begin)

    def prune(self, command: str) -> None:
        """Remove environments that nothing runs from. One that cannot be removed is no reason to fail."""
        lines = list[str]()
        status, stderr = self._shell.run(remote_words(command, "prune", *self._root()), b"", lines.append, SERVICE_S)
        self._progress.step("earlier environments " + ("; ".join(lines) if status == 0 else f"stay: {stderr}"))

    def _find_python(self, names: Sequence[str]) -> str:
        """Take the first that will do. Returns its version. Raises NodeError saying what was found instead."""
        seen = []
        for name in names:
            status, found = self._look_at(remote_words(name, "-"))
            if status or found is None:
                continue
            path, version, ensurepip = found
            plain = ".".join(map(str, version))
            if tuple(version[:2]) < OLDEST:
                seen.append(f"{name} is {plain}")
            elif not ensurepip:
                seen.append(f"{name} ({plain}) cannot make environments: on Debian and Ubuntu, sudo apt install python3-venv")
            else:
                self._python = path if WORD.fullmatch(path) else name  # C:\Program Files has a blank
                return plain
        raise NodeError(
            f"{self._shell.name} has no Python that hafs can use: {'; '.join(seen) or f'no {names[0]} answers'}",
            hint="install Python 3.11 or newer there, or name it: --python /path/to/python3",
        )

    def _look_at(self, command: str) -> tuple[int, Any]:
        lines = list[str]()
        status, _ = self._shell.run(command, (LOOK_AT_PYTHON % MARK).encode(), lines.append, SILENCE_S)
        return status, next((json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)), None)

    def _recall(self) -> None:
        """Options that were not given are those of the last setup. Any Python can read them, that of its environment first."""
        given = self._options
        self._find_python([*filter(None, [python_beside(self._node.command), given.python]), *PYTHONS])
        last = self._script("recall", command=self._node.command)
        pip_args, torch_args = (tuple(last[key]) if last.get(key) else None for key in ("pip_args", "torch_args"))
        self._options = Options(
            python=given.python if given.python is not None else last.get("python"),
            pip_args=given.pip_args if given.pip_args is not None else pip_args,
            torch_args=given.torch_args if given.torch_args is not None else torch_args,
            service=given.service if given.service is not None else last.get("service"),
        )

    def _install(self, made: dict[str, Any], found: dict[str, Any], wheel: Wheel) -> None:
        options = list(self._options.pip_args or ())
        if "node" in self._extras:
            torch, why = torch_arguments(found["platform"], found["cuda"], made["pip_sources"])
            if self._options.torch_args is not None:
                torch, why = list(self._options.torch_args), "as you chose"
            self._pip(made["env"], [*options, *torch, "torch"], f"torch, {why}")
        separator = "\\" if found["platform"] == "win32" else "/"
        target = f"{made['env']}{separator}{wheel.name}" + (f"[{','.join(self._extras)}]" if self._extras else "")
        self._pip(made["env"], [*options, target], f"hafs {hafs_version()} with what it needs")

    def _pip(self, env: str, arguments: list[str], what: str) -> None:
        begin = time.monotonic()
        self._script("pip", env=env, arguments=arguments)
        self._done(what, begin)

    def _script(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Run the bootstrap script. Raises NodeError where it says that something failed, or says nothing."""
        source = files("campaigns.sync").joinpath("bootstrap.py").read_text(encoding="utf-8")
        call = f"\n\nmain({json.dumps({'action': action, **arguments})!r})\n"
        answers = list[dict[str, Any]]()

        def on_line(line: str) -> None:
            if line.startswith(MARK):
                said = json.loads(line[len(MARK) :])
                if "alive" in said:
                    self._progress.working(str(said["alive"]))
                else:
                    answers.append(said)

        _, stderr = self._shell.run(remote_words(self._python, "-"), (source + call).encode("ascii"), on_line, SILENCE_S)
        if not answers or "failed" in answers[-1]:
            raise self._failed(f"setup step {action!r} failed", answers[-1]["failed"] if answers else stderr)
        done: dict[str, Any] = answers[-1]["done"]
        return done

    def _failed(self, what: str, said: str) -> NodeError:
        return NodeError(
            f"{self._shell.name}: {what}: {said[-1500:]}",
            hint="--pip-args and --torch-args pass options to pip (no network there: --pip-args='--no-index --find-links DIR'); "
            "all that pip said is in setup.log, in the environment's folder. Nothing in use was changed",
        )

    def _name(self, wheel: Wheel, version: str, found: dict[str, Any]) -> str:
        """A content name, short: Windows counts the letters of a path. A driver that came later wants another torch."""
        options = [self._options.pip_args, self._options.torch_args, self._extras]
        made_of = [wheel.sha256, self._python, version, *options, bool(found["cuda"])]
        return f"{hafs_version()}-{content_id(made_of)[:8]}"

    def _record(self) -> dict[str, Any]:
        return asdict(self._options)

    def _root(self) -> list[str]:
        return ["--root", self._node.root] if self._node.root else []

    def _done(self, what: str, begin: float) -> None:
        self._progress.step(f"{what} ({time.monotonic() - begin:.0f} s)")
