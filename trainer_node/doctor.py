"""What a node needs, checked without changing anything but one probe file. torch is loaded in a child process only."""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from config.errors import HafsError
from trainer_node.daemon import daemon_pid

NODE_EXTRA = (
    "accelerate",
    "datasets",
    "gguf",
    "httpx",
    "numpy",
    "peft",
    "psutil",
    "tenacity",
    "torch",
    "transformers",
    "trl",
    "zstandard",
)
OWN_PACKAGES = ("config", "trainer_node")
FREE_DISK_GB, FREE_MEMORY_GB = 10, 4
TORCH_TIMEOUT_S = 120
ASK_TORCH = (
    "import torch;"
    "d='cuda '+torch.cuda.get_device_name(0) if torch.cuda.is_available() else"
    " 'mps' if torch.backends.mps.is_available() else f'cpu, {torch.get_num_threads()} threads';"
    "print(f'torch {torch.__version__} on {d}')"
)


class Check(NamedTuple):
    """`hint` says what to do; a check that is ok may still carry one."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def examine(root: Path) -> list[Check]:
    """All checks, in the order in which they would stop a job."""
    return [
        _python(),
        _own_packages(),
        _packages(NODE_EXTRA),
        _torch(),
        _root_writable(root),
        _disk(root),
        _memory(),
        _model_server(root),
        _daemon(root),
    ]


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("Python", ok, f"{sys.version.split()[0]} at {sys.executable}", "" if ok else "hafs needs 3.11 or newer")


def _own_packages() -> Check:
    """`config` is a common name: another package of that name may stand before ours."""
    home = Path(__file__).resolve().parent.parent
    foreign = [name for name in OWN_PACKAGES if _origin(name) != home / name]
    hint = "install hafs into an environment of its own" if foreign else ""
    return Check("hafs packages", not foreign, f"foreign: {', '.join(foreign)}" if foreign else str(home), hint)


def _packages(packages: tuple[str, ...]) -> Check:
    missing = [package for package in packages if find_spec(package) is None]
    detail = f"missing: {', '.join(missing)}" if missing else f"{len(packages)} found"
    return Check("node packages", not missing, detail, 'pip install "hafs[node]"' if missing else "")


def _torch() -> Check:
    hint = "install the torch build for this machine: https://pytorch.org/get-started/locally"
    try:
        argv = [sys.executable, "-P", "-c", ASK_TORCH]
        child = subprocess.run(argv, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("torch", False, f"no answer within {TORCH_TIMEOUT_S} s", hint)
    if child.returncode:
        return Check("torch", False, (child.stderr.strip().splitlines() or ["it does not load"])[-1], hint)
    return Check("torch", True, child.stdout.strip())


def _root_writable(root: Path) -> Check:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as probe:
            probe.write(b"hafs")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return Check("root", False, f"{root}: {error.strerror}", "make it yours, or choose another with --root or HAFS_HOME")
    return Check("root", True, str(root))


def _disk(root: Path) -> Check:
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    hint = "" if free >= FREE_DISK_GB else f"a training run wants {FREE_DISK_GB} GB; free some, or set HAFS_HOME to another disk"
    return Check("disk", not hint, f"{free:.0f} GB free", hint)


def _memory() -> Check:
    if find_spec("psutil") is None:
        return Check("memory", False, "cannot be measured without psutil", 'pip install "hafs[node]"')
    import psutil

    memory = psutil.virtual_memory()
    hint = "" if memory.available / 1e9 >= FREE_MEMORY_GB else "close something, or train a smaller base model"
    return Check("memory", not hint, f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free", hint)


def _model_server(root: Path) -> Check:
    """What `ensure_runtime` would find, without starting anything."""
    name = "model server"
    try:
        from trainer_node.runtime.launch import find_runtime, ollama_url, probe, require_runtime

        url = ollama_url()
        version = "" if os.environ.get("HAFS_RUNTIME") == "embedded" else probe(url)
        if version:
            return Check(name, True, f"Ollama {version} at {url}")
        if running := find_runtime(root):
            return Check(name, True, f"embedded runtime at {running.url}")
        require_runtime()
    except ModuleNotFoundError as error:
        return Check(name, False, f"the package {error.name} is missing", 'pip install "hafs[node,runtime]"')
    except HafsError as error:
        return Check(name, False, str(error), error.hint)
    return Check(name, True, "no Ollama; the embedded runtime starts when it is needed")


def _daemon(root: Path) -> Check:
    """None running is fine: the next submit starts one."""
    pid = daemon_pid(root)
    return Check("daemon", True, "not running; a submit starts it" if pid is None else f"running (pid {pid or 'unknown'})")


def _origin(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None
