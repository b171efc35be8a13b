"""The service of each system: what is written, checked by the system's own tools or grammar, and which commands are given."""

import os
import plistlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from config.errors import NodeError
from trainer_node.service.base import Definition, define, service_name
from trainer_node.service.launchd import Launchd, plist_bytes
from trainer_node.service.systemd import Systemd, unit_text
from trainer_node.service.task_scheduler import SCHEMA, TaskScheduler, task_xml

ROOT = Path('/data/50% off/$HOME/the "node"')
ARGV = ("/data/50% off/env/bin/python", "-P", "-m", "trainer_node.cli", "daemon", "--root", str(ROOT))
NODE = Definition("hafs-node", ARGV, ROOT, {"HAFS_HOME": "/data/50% off", "OLLAMA_HOST": "127.0.0.1:11434"})
WINDOWS = Definition(
    "hafs-node",
    (r"D:\hafs\env\0.1.0-1a2b3c4d\Scripts\python.exe", "-P", "-m", "trainer_node.cli", "daemon", "--root", r"D:\my hafs"),
    Path("D:/my hafs"),
)
SID = "S-1-5-21-1004336348-1177238915-682003330-1001"


class Commands:
    """A service manager that answers as told, by the first words of a command, and remembers what it was asked."""

    def __init__(self, **answers: "tuple[int, str]") -> None:
        self.given = list[list[str]]()
        self._answers = answers

    def __call__(self, argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        self.given.append(list(argv))
        if argv[0].endswith("whoami.exe"):
            return subprocess.CompletedProcess(argv, 0, f'"box\\me","{SID}"\r\n', "")
        words = [word.strip("-/").replace("-", "_").lower() for word in argv]
        status, text = next((answer for word, answer in self._answers.items() if word in words), (0, ""))
        return subprocess.CompletedProcess(argv, status, text, "refused" if status and not text else "")

    def verbs(self) -> list[str]:
        asked = [argv for argv in self.given if not argv[0].endswith("whoami.exe")]
        return [next(word for word in argv[1:] if word not in ("--user", "--no-pager")) for argv in asked]


def test_a_service_a_root_and_what_the_daemon_has_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Path("/home/me/.context/node")
    assert service_name(default, default) == "hafs-node"
    with monkeypatch.context() as windows:
        windows.setattr("os.name", "nt")
        named = service_name(default, default)
    assert named != "hafs-node", "a task of that name may be another account's"
    other = service_name(Path("/data/node"), default)
    assert other.startswith("hafs-node-") and other != service_name(Path("/data/node2"), default)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    made = define(Path("/data/node"), default)
    assert made.environment["OLLAMA_HOST"] == "127.0.0.1:9" and "SECRET_TOKEN" not in made.environment
    assert made.environment["HF_ENDPOINT"] == "https://hub.example.org", "a job fetches its base where the shell would"
    assert made.environment["https_proxy"] == "http://proxy:3128" and "http_proxy" not in made.environment
    assert Path(made.argv[0]).is_absolute() and made.argv[-2:] == ("--root", "/data/node")


# systemd ---------------------------------------------------------------------------------------------------------------


def test_the_unit_says_what_it_must() -> None:
    lines = unit_text(NODE).splitlines()
    assert (
        'ExecStart=:"/data/50%% off/env/bin/python" "-P" "-m" "trainer_node.cli" "daemon" "--root" '
        + ('"/data/50%% off/$HOME/the \\"node\\""')
        in lines
    )
    assert 'Environment="HAFS_HOME=/data/50%% off"' in lines
    assert {"KillMode=process", "OOMPolicy=continue", "Restart=always", "WantedBy=default.target"} <= set(lines)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "50% off $HOME" / "python"
    program.parent.mkdir()
    program.symlink_to("/bin/true")
    unit = tmp_path / "hafs-node.service"
    unit.write_text(unit_text(Definition("hafs-node", (str(program), *ARGV[1:]), tmp_path, NODE.environment)))
    verified = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert "hafs-node" not in verified.stderr and verified.returncode == 0, verified.stderr
    unit.write_text(unit.read_text().replace("KillMode=process", "KillMode=nonsense"))
    broken = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert "nonsense" in broken.stderr, "it looks at what it is given"


def test_systemd_installs_restarts_and_removes(tmp_path: Path) -> None:
    run = Commands(is_active=(0, "active\n"), show_user=(0, "Linger=yes\n"))
    service = Systemd(run, tmp_path)
    assert not service.status("hafs-node").installed
    assert service.install(NODE) == ""
    assert run.verbs() == ["daemon-reload", "enable", "restart", "enable-linger", "show-user"]
    seen = service.status("hafs-node")
    assert seen.installed and seen.running and not seen.hint
    assert service.command("hafs-node") == " ".join(ARGV), "as a process shows it, so that its environment is known to be in use"
    assert service.uninstall("hafs-node") and not service.uninstall("hafs-node")
    assert service.command("hafs-node") == "" and list(tmp_path.iterdir()) == []


def test_without_lingering_the_line_to_run_is_said(tmp_path: Path) -> None:
    service = Systemd(Commands(is_active=(0, "active\n"), show_user=(0, "Linger=no\n")), tmp_path)
    assert "sudo loginctl enable-linger" in service.install(NODE)
    assert "sudo loginctl enable-linger" in service.status("hafs-node").hint


def test_a_service_that_is_down_says_where_to_look(tmp_path: Path) -> None:
    service = Systemd(Commands(is_active=(3, "failed\n"), show_user=(0, "Linger=yes\n")), tmp_path)
    service.install(NODE)
    seen = service.status("hafs-node")
    assert seen.installed and not seen.running and "failed" in seen.detail and "journalctl --user -u hafs-node" in seen.hint


def test_what_systemd_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="does not enable.*refused"):
        Systemd(Commands(enable=(1, "")), tmp_path).install(NODE)


# launchd ---------------------------------------------------------------------------------------------------------------


def test_the_property_list_can_be_read_back() -> None:
    made = plistlib.loads(plist_bytes(NODE))
    assert made["Label"] == "org.hafs.hafs-node" and made["ProgramArguments"] == list(ARGV)
    assert made["RunAtLoad"] is made["KeepAlive"] is made["AbandonProcessGroup"] is True
    assert made["EnvironmentVariables"]["HAFS_HOME"] == "/data/50% off"
    assert plist_bytes(NODE).startswith(b"<?xml")


def test_launchd_falls_back_to_the_users_domain(tmp_path: Path) -> None:
    run = Commands()

    def no_screen(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        done = run(argv)
        done.returncode = int("bootstrap" in argv and argv[2].startswith("gui/"))
        return done

    node = Definition("hafs-node", ARGV, tmp_path / "root")
    service = Launchd(no_screen, tmp_path / "agents")
    assert "automatic log-in" in service.install(node)
    assert [argv[2].split("/")[0] for argv in run.given if argv[1] == "bootstrap"] == ["gui", "user"]
    assert service.command("hafs-node").startswith(ARGV[0])
    assert not service.status("hafs-node").running
    assert service.uninstall("hafs-node") and not service.uninstall("hafs-node")


def test_launchd_knows_a_running_agent(tmp_path: Path) -> None:
    service = Launchd(Commands(print=(0, "\tstate = running\n")), tmp_path / "agents")
    service.install(Definition("hafs-node", ARGV, tmp_path / "root"))
    assert service.status("hafs-node").running


# Task Scheduler --------------------------------------------------------------------------------------------------------

# What the schema's complex types allow. Most are xs:all, free in order; the two of ORDERED are kept in the order of Windows' own.
KNOWN = {
    "Task": {"RegistrationInfo", "Triggers", "Principals", "Settings", "Data", "Actions"},
    "RegistrationInfo": {"URI", "SecurityDescriptor", "Source", "Date", "Author", "Version", "Description", "Documentation"},
    "Triggers": {"BootTrigger"},
    "Repetition": {"Interval", "Duration", "StopAtDurationEnd"},
    "BootTrigger": {"Enabled", "StartBoundary", "EndBoundary", "Repetition", "ExecutionTimeLimit", "Delay"},
    "Principals": {"Principal"},
    "Principal": {"UserId", "LogonType", "GroupId", "DisplayName", "RunLevel", "ProcessTokenSidType", "RequiredPrivileges"},
    "Settings": {
        *("AllowStartOnDemand", "RestartOnFailure", "MultipleInstancesPolicy", "DisallowStartIfOnBatteries", "Enabled", "Hidden"),
        *("StopIfGoingOnBatteries", "AllowHardTerminate", "StartWhenAvailable", "NetworkProfileName", "WakeToRun", "Priority"),
        *("RunOnlyIfNetworkAvailable", "DeleteExpiredTaskAfter", "IdleSettings", "NetworkSettings", "RunOnlyIfIdle"),
        *("ExecutionTimeLimit", "UseUnifiedSchedulingEngine", "DisallowStartOnRemoteAppSession"),
    },
    "RestartOnFailure": {"Interval", "Count"},
    "Actions": {"Exec"},
    "Exec": {"Command", "Arguments", "WorkingDirectory"},
}
ORDERED = {
    "Task": ["RegistrationInfo", "Triggers", "Principals", "Settings", "Actions"],
    "RestartOnFailure": ["Interval", "Count"],
}


def task_of(definition: Definition) -> ElementTree.Element:
    data = task_xml(definition, SID)
    assert data[:2] in (b"\xff\xfe", b"\xfe\xff"), "schtasks wants UTF-16 with a byte order mark"
    return ElementTree.fromstring(data)


def names(element: ElementTree.Element) -> list[str]:
    return [child.tag.removeprefix(f"{{{SCHEMA}}}") for child in element]


def text_of(task: ElementTree.Element, path: str) -> str | None:
    found = task.find("/".join(f"{{{SCHEMA}}}{part}" for part in path.split("/")))
    assert found is not None, path
    return found.text


def test_the_task_is_made_of_the_schemas_elements_each_once() -> None:
    task = task_of(WINDOWS)
    assert task.tag == f"{{{SCHEMA}}}Task" and task.get("version") == "1.3"
    for element in task.iter():
        name, children = element.tag.removeprefix(f"{{{SCHEMA}}}"), names(element)
        if children:
            assert set(children) <= KNOWN[name] and len(set(children)) == len(children), name
        if name in ORDERED:
            assert children == ORDERED[name]


def test_the_task_starts_with_the_machine_and_has_no_end() -> None:
    task = task_of(WINDOWS)
    assert text_of(task, "Triggers/BootTrigger/Enabled") == "true"
    assert text_of(task, "Principals/Principal/LogonType") == "S4U" and text_of(task, "Principals/Principal/UserId") == SID
    assert text_of(task, "Settings/ExecutionTimeLimit") == "PT0S"
    assert text_of(task, "Triggers/BootTrigger/Repetition/Interval") == "PT5M", "a daemon that has ended is there again"
    assert text_of(task, "Settings/MultipleInstancesPolicy") == "IgnoreNew", "and one that runs stays alone"
    assert task.find(f"{{{SCHEMA}}}Triggers/{{{SCHEMA}}}BootTrigger/{{{SCHEMA}}}Repetition/{{{SCHEMA}}}Duration") is None
    assert 1 <= int(text_of(task, "Settings/RestartOnFailure/Count") or 0) <= 255, "the schema has an unsignedByte"
    assert text_of(task, "Settings/DisallowStartIfOnBatteries") == text_of(task, "Settings/StopIfGoingOnBatteries") == "false"
    assert text_of(task, "Actions/Exec/Command") == WINDOWS.argv[0]
    assert text_of(task, "Actions/Exec/Arguments") == '-P -m trainer_node.cli daemon --root "D:\\my hafs"'


def test_a_task_with_an_environment_goes_through_cmd() -> None:
    task = task_of(Definition(WINDOWS.name, WINDOWS.argv, WINDOWS.root, {"OLLAMA_HOST": "127.0.0.1:9", "HAFS_HOME": "D:\\h & h"}))
    assert text_of(task, "Actions/Exec/Command") == "cmd.exe"
    arguments = text_of(task, "Actions/Exec/Arguments")
    assert arguments == (
        '/d /s /c "set "HAFS_HOME=D:\\h & h" && set "OLLAMA_HOST=127.0.0.1:9" && '
        'D:\\hafs\\env\\0.1.0-1a2b3c4d\\Scripts\\python.exe -P -m trainer_node.cli daemon --root "D:\\my hafs""'
    )


def test_the_task_is_created_started_and_removed(tmp_path: Path) -> None:
    run = Commands()
    service = TaskScheduler(run)
    node = Definition("hafs-node", WINDOWS.argv, tmp_path)
    assert service.install(node) == "" and run.verbs() == ["/Create", "/Run"]
    assert run.given[1][:5] == ["schtasks", "/Create", "/F", "/TN", "hafs-node"]
    assert service.uninstall("hafs-node") and run.verbs()[-1] == "/Delete"


@pytest.mark.parametrize("environment", [{}, {"OLLAMA_HOST": "127.0.0.1:9"}])
def test_the_command_of_a_task_names_its_environment(environment: dict[str, str]) -> None:
    node = Definition(WINDOWS.name, WINDOWS.argv, WINDOWS.root, environment)
    shown = task_xml(node, SID).decode("utf-16")
    command = TaskScheduler(Commands(xml=(0, f"\n{shown}"))).command("hafs-node")
    assert subprocess.list2cmdline(WINDOWS.argv) in command


def test_the_task_is_that_of_who_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERDOMAIN", "WORKGROUP")  # what sshd for Windows says
    written = []
    run = Commands()

    def read(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        if "/XML" in argv:
            written.append(Path(argv[-1]).read_bytes())
        return run(argv)

    TaskScheduler(read).install(Definition("hafs-node", WINDOWS.argv, tmp_path))
    assert text_of(ElementTree.fromstring(written[0]), "Principals/Principal/UserId") == SID


def test_an_account_without_a_name_is_an_error(tmp_path: Path) -> None:
    def silent(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(argv, 1, "", "no token")

    with pytest.raises(NodeError, match="who installs: no token"):
        TaskScheduler(silent).install(Definition("hafs-node", WINDOWS.argv, tmp_path))


@pytest.mark.parametrize("value", ["D:\\50%OS%", 'a"b', "a\nb"])
def test_what_cmd_would_take_apart_is_refused(value: str) -> None:
    with pytest.raises(NodeError, match="HAFS_HOME"):
        task_xml(Definition(WINDOWS.name, WINDOWS.argv, WINDOWS.root, {"HAFS_HOME": value}), SID)


def test_what_needs_an_administrator_is_said(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="refuses the task hafs-node: Access") as refused:
        TaskScheduler(Commands(create=(1, "Access is denied."))).install(Definition("hafs-node", WINDOWS.argv, tmp_path))
    assert "Run as administrator" in refused.value.hint
    none = TaskScheduler(Commands(query=(1, "")))
    assert not none.status("hafs-node").installed and not none.uninstall("hafs-node") and none.command("hafs-node") == ""
