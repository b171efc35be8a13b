"""What a node needs, checked without changing anything but one probe file. torch is loaded in a child process only."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
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
CLOCK_S = 60
ASK_TORCH = (
    "import json, torch;"
    "d='cuda '+torch.cuda.get_device_name(0) if torch.cuda.is_available() else"
    " 'mps' if torch.backends.mps.is_available() else f'cpu, {torch.get_num_threads()} threads';"
    "print(json.dumps([torch.__version__, d]))"
)
TORCH_HINT = (
    "install the torch build for this machine: hafs nodes setup NAME --torch-args='--index-url …', see pytorch.org/get-started"
)


class Check(NamedTuple):
    """`hint` says what to do; a check that is ok may still carry one."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def examine(root: Path, laptop_time: float = 0.0) -> list[Check]:
    """All checks, in the order in which they would stop a job. `laptop_time`: the laptop's clock now, in Unix seconds."""
    checks = [_python(), _own_packages(), _packages(NODE_EXTRA)]
    if find_spec("psutil") is None:  # the rest needs it; what is missing has been said
        return checks
    from trainer_node.leases import CPU, devices

    queue, busy = _queue(root)
    return [
        *checks,
        _torch(devices()[0] != CPU),
        _root_writable(root),
        queue,
        _disk(root),
        _memory(busy),
        _model_server(root),
        _quantizer(),
        _service(root),
        _daemon(root),
        *([_clock(time.time() - laptop_time)] if laptop_time else []),
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


def _torch(nvidia: bool) -> Check:
    """A machine with an NVIDIA GPU whose torch does not see it would train on its processor, for days."""
    try:
        argv = [sys.executable, "-P", "-c", ASK_TORCH]
        child = subprocess.run(argv, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("torch", False, f"no answer within {TORCH_TIMEOUT_S} s", TORCH_HINT)
    if child.returncode:
        return Check("torch", False, (child.stderr.strip().splitlines() or ["it does not load"])[-1], TORCH_HINT)
    version, device = json.loads(child.stdout.splitlines()[-1])
    if nvidia and not device.startswith("cuda"):
        return Check("torch", False, f"torch {version} does not see the NVIDIA GPU of this machine", TORCH_HINT)
    return Check("torch", True, f"{version} on {device}")


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


def _queue(root: Path) -> tuple[Check, str]:
    """Whether the jobs can be read, and the one that runs now. An older hafs that is still in use keeps its file as it is."""
    from trainer_node.database import is_older
    from trainer_node.gpu import training

    try:
        if is_older(root / "state.sqlite"):
            return Check("queue", True, "of an older hafs; the first use of this one brings it up to date"), "perhaps a job"
        busy = ", ".join(each.job for each in training(root))
    except HafsError as error:
        return Check("queue", False, str(error), error.hint), ""
    return Check("queue", True, f"{busy} runs" if busy else "no job runs"), busy


def _disk(root: Path) -> Check:
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    hint = "" if free >= FREE_DISK_GB else f"a training run wants {FREE_DISK_GB} GB; free some, or set HAFS_HOME to another disk"
    return Check("disk", not hint, f"{free:.0f} GB free", hint)


def _memory(busy: str) -> Check:
    """`busy`: the job that runs now, whose memory is no fault."""
    from trainer_node.machine import free_memory, total_memory

    free = free_memory() / 1e9
    low = free < FREE_MEMORY_GB
    detail = f"{free:.0f} of {total_memory() / 1e9:.0f} GB free" + (f", while {busy} runs" if busy else "")
    return Check("memory", not low or bool(busy), detail, "close something, or train a smaller base model" if low else "")


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


def _quantizer() -> Check:
    """Only makes models smaller, so none is no fault."""
    try:
        from trainer_node.export.quantize import choose
    except ModuleNotFoundError as error:
        return Check("quantizer", False, f"the package {error.name} is missing", 'pip install "hafs[node]"')
    choice = choose("Q4_K_M")
    hint = "to make smaller files of merged models, put llama.cpp's llama-quantize into the PATH" if choice.note else ""
    return Check("quantizer", True, choice.name, hint)


def _service(root: Path) -> Check:
    """Without a service all works while somebody asks; after a reboot the queue waits for the first who does."""
    from trainer_node.service.install import status

    try:
        found = status(root)
    except HafsError as error:
        return Check("service", False, str(error), error.hint)
    return Check("service", found.running or not found.installed, found.detail, found.hint)


def _clock(ahead_s: float) -> Check:
    """Both write times into the same records."""
    if abs(ahead_s) < CLOCK_S:
        return Check("clock", True, "as the laptop's")
    how = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the laptop's"
    return Check("clock", False, how, "let both machines set their clocks by NTP")


def _daemon(root: Path) -> Check:
    """None running is fine: the next submit starts one."""
    try:
        pid = daemon_pid(root)
    except HafsError as error:
        return Check("daemon", False, str(error), error.hint)
    return Check("daemon", True, "not running; a submit starts it" if pid is None else f"running (pid {pid or 'unknown'})")


def _origin(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None
