import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from config.locks import FileLock
from trainer_node import doctor
from trainer_node.daemon import daemon_pid, lock_file
from trainer_node.database import VERSIONS
from trainer_node.service import install
from trainer_node.service.base import ServiceStatus

COMMANDS = ("daemon", "rpc", "runtime", "doctor", "install", "uninstall", "prune", "status")


def node(*args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-P", "-m", "trainer_node.cli", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100, env=os.environ | env, check=False)


def test_the_version() -> None:
    done = node("--version")
    assert done.returncode == 0 and done.stdout.startswith("hafs-node ")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
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


@pytest.mark.parametrize("broken", ["root is a file", "damaged queue"])
def test_doctor_says_all_it_can_of_a_broken_node(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_TORCH", f"print({json.dumps(json.dumps(['2.13', 'cpu']))})")
    root = tmp_path / "node"
    if broken == "root is a file":
        root.write_text("x")
    else:
        root.mkdir()
        (root / "state.sqlite").write_bytes(b"no database " * 100)
    checks = doctor.examine(root)
    assert {"Python", "torch", "root", "queue", "disk", "memory", "model server", "service", "daemon"} <= {c.name for c in checks}
    red = {check.name: check for check in checks if not check.ok}
    assert set(red) & {"root", "queue"} == {"root" if broken == "root is a file" else "queue"}
    assert all(check.hint for check in red.values()), "each says what to do"


def test_the_doctor_of_an_upgrade_leaves_the_queue_of_the_hafs_in_use_alone(tmp_path: Path) -> None:
    """It is asked before the node changes to the new hafs, and may find a reason not to."""
    with closing(sqlite3.connect(tmp_path / "state.sqlite")) as older:
        older.executescript(f"{VERSIONS[0]} PRAGMA user_version=1;")
    (check,) = (check for check in doctor.examine(tmp_path) if check.name == "queue")
    assert check.ok and "older hafs" in check.detail
    with closing(sqlite3.connect(tmp_path / "state.sqlite")) as older:
        assert older.execute("PRAGMA user_version").fetchone() == (1,)


def test_what_the_doctor_may_find_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check that can be red, made red."""
    for name, low in (("FREE_DISK_GB", 10**9), ("FREE_MEMORY_GB", 10**9), ("ASK_TORCH", "import no_such_torch")):
        monkeypatch.setattr(doctor, name, low)
    monkeypatch.setattr(doctor, "NODE_EXTRA", ("no_such_package_xyz",))
    monkeypatch.setattr(doctor, "OWN_PACKAGES", ("json",))
    monkeypatch.setattr("trainer_node.runtime.launch.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(install, "service_here", lambda: Down())
    (tmp_path / "file").write_text("x")
    checks = doctor.examine(tmp_path / "file" / "below", laptop_time=time.time() - 3600)
    red = {check.name: check.hint for check in checks if not check.ok}
    names = {"hafs packages", "node packages", "torch", "root", "disk", "memory", "model server", "service", "clock"}
    assert set(red) == names and all(red.values())


class Down:
    kind = "unit"

    def status(self, name: str) -> ServiceStatus:
        return ServiceStatus(True, False, f"{name} is failed", "hafs-node install starts it anew")


def test_status_of_a_damaged_queue_says_the_rest(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_bytes(b"no database " * 100)
    done = node("status", "--root", str(tmp_path))
    assert done.returncode == 0 and "is damaged" in done.stdout and "daemon      not running" in done.stdout


def test_doctor_for_programs(tmp_path: Path) -> None:
    done = node("doctor", "--json", "--root", str(tmp_path))
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert {"Python", "torch", "disk", "memory", "root", "daemon", "model server"} <= set(checks)
    assert done.returncode == (0 if all(check["ok"] for check in checks.values()) else 1)


@pytest.mark.parametrize(
    ("device", "nvidia", "ok"), [("cpu, 2 threads", False, True), ("cpu, 2 threads", True, False), ("cuda X", True, True)]
)
def test_a_torch_that_does_not_see_the_gpu_is_a_fault(
    device: str, nvidia: bool, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ASK_TORCH", f"print('noise'); print({json.dumps(json.dumps(['2.13', device]))})")
    check = doctor._torch(nvidia)
    assert check.ok is ok and "2.13" in check.detail and ("--torch-args" in check.hint) is not ok


def test_a_torch_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_TORCH", "raise ImportError('libcudart.so.13 is missing')")
    assert not doctor._torch(False).ok and "libcudart.so.13" in doctor._torch(False).detail


@pytest.mark.parametrize(
    ("ahead_s", "ok", "said"), [(3, True, "as the laptop's"), (3600, False, "ahead of"), (-90, False, "90 s behind")]
)
def test_a_clock_that_differs_is_a_fault(ahead_s: float, ok: bool, said: str) -> None:
    check = doctor._clock(ahead_s)
    assert check.ok is ok and said in check.detail


def test_the_memory_of_a_job_that_runs_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FREE_MEMORY_GB", 10**6)
    assert not doctor._memory("").ok
    busy = doctor._memory("sft-1")
    assert busy.ok and "while sft-1 runs" in busy.detail and busy.hint


def test_without_a_service_manager_all_is_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.install(tmp_path / "node") == install.ON_DEMAND
    assert install.uninstall(tmp_path / "node") == "no service was installed"
    check = doctor._service(tmp_path / "node")
    assert check.ok and check.detail == install.ON_DEMAND


def test_the_daemon_that_runs_makes_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = [sys.executable, "-P", "-m", "trainer_node.cli", "daemon", "--root", str(tmp_path / "node")]
    with subprocess.Popen(argv) as daemon:
        end = time.monotonic() + 60
        while not daemon_pid(tmp_path / "node"):
            assert time.monotonic() < end and daemon.poll() is None
            time.sleep(0.05)
        threading.Thread(target=daemon.wait, daemon=True).start()  # as init does for a real one
        install.install(tmp_path / "node")
        assert daemon_pid(tmp_path / "node") is None and daemon.wait(30) == 0


def test_status_starts_and_writes_nothing(tmp_path: Path) -> None:
    done = node("status", "--json", "--root", str(tmp_path / "node"))
    seen = json.loads(done.stdout)
    assert seen["daemon"] == "not running" and seen["jobs"] == "none" and seen["root"] == str(tmp_path / "node")
    assert not (tmp_path / "node").exists()
