"""A task of the Windows Task Scheduler: at startup, whether the user is logged on or not, with no time limit.

LogonType S4U runs it as the user without keeping a password. To register such a task needs an administrator's shell.
"Restart on failure" means a task that could not be started; that a daemon is there again which has ended is the trigger's doing,
which repeats: while one runs, MultipleInstancesPolicy lets the others go by. Tasks belong to the machine, not to an account.
Source: Microsoft, Task Scheduler Schema (http://schemas.microsoft.com/windows/2004/02/mit/task).
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from config.errors import NodeError
from trainer_node.service.base import Definition, Run, ServiceStatus, require, run

SCHEMA = "http://schemas.microsoft.com/windows/2004/02/mit/task"
AGAIN = "PT5M"
ADMINISTRATOR = "open a terminal with `Run as administrator` on that machine and run there: hafs-node install"


def task_xml(definition: Definition, user: str) -> bytes:
    """The task as `schtasks /Create /XML` reads it: UTF-16 with a byte order mark. `user`: the SID of an account.

    Raises:
        NodeError: a value of the environment cannot be handed on.
    """
    task = ElementTree.Element("Task", {"version": "1.3", "xmlns": SCHEMA})
    _add(task, "RegistrationInfo", {"Description": f"hafs trainer node {definition.root}", "URI": f"\\{definition.name}"})
    boot = _add(ElementTree.SubElement(task, "Triggers"), "BootTrigger", {})
    _add(boot, "Repetition", {"Interval": AGAIN, "StopAtDurationEnd": "false"})  # without a Duration: for ever
    ElementTree.SubElement(boot, "Enabled").text = "true"
    principal = {"UserId": user, "LogonType": "S4U", "RunLevel": "LeastPrivilege"}
    _add(ElementTree.SubElement(task, "Principals"), "Principal", principal).set("id", "Author")
    settings = _add(
        task,
        "Settings",
        {
            "MultipleInstancesPolicy": "IgnoreNew",
            "DisallowStartIfOnBatteries": "false",
            "StopIfGoingOnBatteries": "false",
            "AllowHardTerminate": "true",
            "StartWhenAvailable": "true",
            "RunOnlyIfNetworkAvailable": "false",
            "AllowStartOnDemand": "true",
            "Enabled": "true",
            "Hidden": "false",
            "RunOnlyIfIdle": "false",
            "WakeToRun": "false",
            "ExecutionTimeLimit": "PT0S",  # none
            "Priority": "5",  # the default, 7, is below normal for the processor, the disk and the memory of all children
        },
    )
    _add(settings, "RestartOnFailure", {"Interval": "PT1M", "Count": "255"})  # an unsignedByte
    actions = ElementTree.SubElement(task, "Actions", {"Context": "Author"})
    command, arguments = _action(definition)
    _add(actions, "Exec", {"Command": command, "Arguments": arguments, "WorkingDirectory": str(definition.root)})
    text: bytes = ElementTree.tostring(task, encoding="utf-16", xml_declaration=True)
    return text


class TaskScheduler:
    kind = "Task Scheduler task"

    def __init__(self, run: Run = run) -> None:
        self._run = run

    def install(self, definition: Definition) -> str:
        definition.root.mkdir(parents=True, exist_ok=True)
        user = self._account()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "task.xml"
            file.write_bytes(task_xml(definition, user))
            done = self._run(["schtasks", "/Create", "/F", "/TN", definition.name, "/XML", str(file)])
        require(done, f"the Task Scheduler refuses the task {definition.name}", ADMINISTRATOR)
        require(
            self._run(["schtasks", "/Run", "/TN", definition.name]), f"the task {definition.name} does not start", ADMINISTRATOR
        )
        return ""

    def uninstall(self, name: str) -> bool:
        if not self._known(name):
            return False
        require(self._run(["schtasks", "/Delete", "/F", "/TN", name]), f"the task {name} cannot be removed", ADMINISTRATOR)
        return True

    def status(self, name: str) -> ServiceStatus:
        """Its words are in the language of Windows, so whether it runs is read from the daemon's lock by who asks."""
        known = self._known(name)
        return ServiceStatus(known, known, f"task {name}" if known else "not installed", "" if known else ADMINISTRATOR)

    def command(self, name: str) -> str:
        shown = self._run(["schtasks", "/Query", "/TN", name, "/XML"])
        if shown.returncode:
            return ""
        try:
            task = ElementTree.fromstring(shown.stdout[shown.stdout.index("<Task") :])
        except (ValueError, ElementTree.ParseError) as error:
            raise NodeError(f"the task {name} cannot be read: {error}", hint="hafs-node install writes it anew") from error
        action = f"{{{SCHEMA}}}Actions/{{{SCHEMA}}}Exec/{{{SCHEMA}}}"
        return " ".join(found.text or "" for part in ("Command", "Arguments") for found in task.findall(action + part))

    def _account(self) -> str:
        """The SID of who installs. Not USERDOMAIN: sshd for Windows puts the workgroup there (Win32-OpenSSH #2407)."""
        whoami = os.environ.get("SystemRoot", r"C:\Windows") + r"\System32\whoami.exe"  # others may be in the PATH
        shown = self._run([whoami, "/user", "/fo", "csv", "/nh"])
        found = re.search(r"S-1-[0-9-]+", shown.stdout)
        if shown.returncode or not found:
            raise NodeError(f"whoami does not say who installs: {shown.stdout or shown.stderr}", hint=ADMINISTRATOR)
        return found[0]

    def _known(self, name: str) -> bool:
        return self._run(["schtasks", "/Query", "/TN", name]).returncode == 0


def _action(definition: Definition) -> tuple[str, str]:
    """Command and arguments. A task has no environment of its own: cmd sets what the daemon has to know."""
    if not definition.environment:
        return definition.argv[0], subprocess.list2cmdline(definition.argv[1:])
    for key, value in definition.environment.items():
        if re.search(r'["%\r\n]', value):
            raise NodeError(f"{key} = {value!r}: cmd would take it apart", hint=f"set {key} to a value without % and quotes")
    sets = " && ".join(f'set "{key}={value}"' for key, value in sorted(definition.environment.items()))
    return "cmd.exe", f'/d /s /c "{sets} && {subprocess.list2cmdline(definition.argv)}"'


def _add(parent: ElementTree.Element, name: str, values: dict[str, str]) -> ElementTree.Element:
    made = ElementTree.SubElement(parent, name)
    for key, value in values.items():
        ElementTree.SubElement(made, key).text = value
    return made
