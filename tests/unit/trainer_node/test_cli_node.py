import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config.locks import FileLock
from trainer_node import doctor
from trainer_node.daemon import lock_file


def node(*args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-P", "-m", "trainer_node.cli", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100, env=os.environ | env, check=False)


def test_the_version() -> None:
    done = node("--version")
    assert done.returncode == 0 and done.stdout.startswith("hafs-node ")


@pytest.mark.parametrize("command", [(), ("daemon",), ("rpc",), ("runtime",), ("doctor",)])
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    done = node(*command, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


def test_an_error_is_a_line_a_hint_and_a_code(tmp_path: Path) -> None:
    lock = FileLock(lock_file(tmp_path))
    assert lock.acquire()
    lock.sign()
    done = node("daemon", "--root", str(tmp_path))
    lock.release()
    assert done.returncode == 21
    assert done.stderr.splitlines() == [
        f"error: a daemon serves {tmp_path} already (pid {os.getpid()})",
        "  there is nothing to do",
    ]


def test_a_wrong_option_is_exit_code_2() -> None:
    assert node("daemon", "--nonsense").returncode == 2


def test_the_root_is_below_hafs_home(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "trainer_node.cli", "rpc"],
        input='{"verb": "ping"}\n',
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HAFS_HOME": str(tmp_path)},
        check=True,
    )
    assert json.loads(done.stdout)["result"]["root"] == str(tmp_path / "node")


def test_ctrl_c_is_130(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "trainer_node.cli", "rpc", "--root", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b'{"verb": "ping"}\n')
    child.stdin.flush()
    assert child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == 130 and b"Traceback" not in stderr


def test_doctor_says_one_line_each_and_needs_no_root(tmp_path: Path) -> None:
    checks = {check.name: check for check in (doctor._python(), doctor._own_packages(), doctor._root_writable(tmp_path / "new"))}
    assert all(check.ok for check in checks.values())
    missing = doctor._packages(("json", "no_such_package_xyz"))
    assert not missing.ok and "no_such_package_xyz" in missing.detail and "hafs[node]" in missing.hint
    assert "not running" in doctor._daemon(tmp_path).detail
    (tmp_path / "file").write_text("")
    assert not doctor._root_writable(tmp_path / "file" / "below").ok
    assert "GB free" in doctor._disk(tmp_path / "not" / "yet").detail


def test_doctor_for_programs(tmp_path: Path) -> None:
    done = node("doctor", "--json", "--root", str(tmp_path))
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert {"Python", "torch", "disk", "memory", "root", "daemon", "model server"} <= set(checks)
    assert done.returncode == (0 if all(check["ok"] for check in checks.values()) else 1)
