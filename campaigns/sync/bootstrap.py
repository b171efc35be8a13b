"""What the setup of a node runs there: this file goes to the node's own Python on stdin, followed by a call of `main`.

It needs Python 3.11 and nothing else. Its arguments and answers are JSON, so nothing is quoted for any shell. A line of its
own begins with MARK; whatever else a shell's start-up files print is passed over. While pip works it says so every ALIVE_S:
when nobody reads that any more, pip is killed, and what is not whole is made anew by the next setup. One setup at a time changes
environments; the lock that says so is held by pip, too, should it outlive this script.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "HAFS "
ALIVE_S = 5.0
PATIENCE_S = 15.0  # a setup that was cut off notices within ALIVE_S
DRIVER_S = 60.0
LOG = "setup.log"
FULL_BYTES = 50 * 2**20
NVIDIA_SMI = ("nvidia-smi", r"C:\Windows\System32\nvidia-smi.exe", "/usr/lib/wsl/lib/nvidia-smi")


def main(text: str) -> None:
    args: dict[str, Any] = json.loads(text)
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "look": look,
        "recall": recall,
        "make": make,
        "pip": pip,
        "finish": finish,
    }
    try:
        say(done=actions[args.pop("action")](**args))
    except OSError as error:
        say(failed=f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
    except subprocess.CalledProcessError as error:
        words = (error.output or b"").decode(errors="replace").strip()
        say(failed=f"{' '.join(map(str, error.cmd))} ended with status {error.returncode}: {words}")


def look(root: str) -> dict[str, Any]:
    """What decides which torch fits: the system, the driver's CUDA version (empty: no NVIDIA GPU), and where all of it goes."""
    return {"platform": sys.platform, "root": str(node_root(root)), "cuda": cuda_version()}


def recall(command: str) -> dict[str, Any]:
    """What an earlier setup was told, by the path of the hafs-node that it made; empty for any other, and where it is lost."""
    path = Path(command).expanduser()
    record = path.parent.parent / "environment.json"
    if not path.is_absolute() or not record.is_file():
        return {}
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:  # a disk that lost power: then the options of today count alone
        return {}
    return found if isinstance(found, dict) else {}


def make(root: str, name: str, wheel: str, data: str) -> dict[str, Any]:
    """An environment with the wheel in it, not yet installed. One that is whole is left as it is."""
    env = node_root(root) / "env" / name
    with alone(env) as lock:
        whole = (env / "environment.json").is_file()
        if not whole:
            shutil.rmtree(env, ignore_errors=True)
            env.mkdir(parents=True, exist_ok=True)
            run([sys.executable, "-m", "venv", str(env)], env, lock)
            (env / wheel).write_bytes(base64.b64decode(data))
    configured = said([str(python_of(env)), "-m", "pip", "config", "list"]) if not whole else ""
    sources = re.findall(r"(?:index-url|extra-index-url|find-links|no-index|constraint)=.*", configured)
    return {"env": str(env), "whole": whole, "pip_sources": sources}


def pip(env: str, arguments: list[str]) -> dict[str, Any]:
    """`pip install` in the environment. Raises CalledProcessError with the end of what it printed."""
    folder = Path(env)
    common = ["-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--progress-bar", "off"]
    with alone(folder) as lock:
        run([str(python_of(folder)), *common, *arguments], folder, lock)
    return {}


def finish(env: str, record: dict[str, Any]) -> dict[str, Any]:
    """Mark the environment as whole, last. Returns the command that nodes.toml is to have."""
    folder = Path(env)
    command = python_of(folder).with_name("hafs-node.exe" if os.name == "nt" else "hafs-node")
    if not command.is_file():
        raise FileNotFoundError(2, "pip did not make it", str(command))
    temp = folder / "environment.json.new"
    with temp.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, folder / "environment.json")
    return {"command": str(command)}


def node_root(root: str) -> Path:
    """As hafs-node itself finds it."""
    home = Path(os.environ.get("HAFS_HOME") or "~/.context").expanduser()
    return (Path(root).expanduser() if root else home / "node").resolve()


def python_of(env: Path) -> Path:
    return env / "Scripts" / "python.exe" if os.name == "nt" else env / "bin" / "python"


def cuda_version() -> str:
    """The newest CUDA that the NVIDIA driver can run, such as 12.8; empty where there is none. Raises OSError where it hangs."""
    program = next((found for name in NVIDIA_SMI if (found := shutil.which(name))), None)
    if program is None:
        return ""
    try:
        asked = subprocess.run([program], stdin=subprocess.DEVNULL, capture_output=True, timeout=DRIVER_S)
    except subprocess.TimeoutExpired:
        raise TimeoutError(110, "the NVIDIA driver does not answer: restart the machine", program) from None
    shown = asked.stdout.decode(errors="replace")
    version = re.search(r"CUDA[^:]*Version:\s*(\d+\.\d+)", shown)
    return version[1] if version else ""


def said(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return done.stdout.decode(errors="replace")


def run(argv: list[str], env: Path, lock: int) -> None:
    """A step that makes `env`, what it prints in LOG. Where it fails, nothing but LOG stays: half of torch would fill the disk.

    Raises:
        CalledProcessError: with the end of what it printed.
    """
    log = env / LOG
    try:
        status = watched(argv, log, lock)
        if status:
            full = shutil.disk_usage(env).free < FULL_BYTES  # then the log may have no words
            said_last = f"the disk of {env} is full: " * full + last_words(log, 600)
            raise subprocess.CalledProcessError(status, argv[:3], said_last.encode())
    except BaseException:
        for path in env.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOG:
                path.unlink()
        raise


def watched(argv: list[str], log: Path, lock: int) -> int:
    """Its exit status. It ends with this script, unless that is killed; then it keeps the lock until it has ended itself."""
    kept = () if sys.platform == "win32" else (lock,)
    with log.open("ab") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=kept)
        try:
            while True:
                try:
                    return process.wait(ALIVE_S)
                except subprocess.TimeoutExpired:
                    say(alive=(last_words(log, 300).splitlines() or [argv[2]])[-1])
        finally:
            process.kill()
            process.wait()


@contextmanager
def alone(env: Path) -> Iterator[int]:
    """The lock on all environments of the node, an open file. Raises OSError where another setup keeps it."""
    env.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(env.parent / "setup.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + PATIENCE_S
        while not locked(handle):
            if time.monotonic() > end:
                raise BlockingIOError(11, "another setup works there: wait for it, and try again", str(env.parent))
            time.sleep(0.2)
        yield handle
    finally:
        os.close(handle)


def locked(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def last_words(log: Path, count: int) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - count))
        return file.read().decode(errors="replace").strip()


def say(**words: Any) -> None:
    """One line of ours."""
    sys.stdout.write(MARK + json.dumps(words) + "\n")
    sys.stdout.flush()
