"""Find a server that speaks Ollama's API, or start the embedded one.

A real Ollama that answers wins; then a living runtime of this root; then one is started, detached, which ends when idle.
A `runtime.json` is believed only if its process is the one that wrote it and its address answers.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_exponential

from config.errors import ConfigError, MissingExtra, ProviderUnavailable, StoreHeld
from trainer_node.processes import ProcessId, alive, reap, start_detached

DEFAULT_OLLAMA = "127.0.0.1:11434"
IDLE_EXIT_S = 900
START_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 2.0
LOG_TAIL_BYTES = 2000


@dataclass(frozen=True)
class RuntimeInfo:
    """A server that answered just now. `embedded`: it is ours; `started`: by this call."""

    url: str
    embedded: bool
    version: str
    started: bool


def ensure_runtime(root: Path) -> RuntimeInfo:
    """A server for the node at `root`, started if there is none. `HAFS_RUNTIME=embedded` leaves a real Ollama aside.

    Raises:
        MissingExtra: none answers and llama.cpp is not installed.
        ProviderUnavailable: the runtime did not start; the message ends with its log.
        ConfigError: OLLAMA_HOST is no address.
    """
    return find_server(root) or _start(root)


def find_server(root: Path) -> RuntimeInfo | None:
    """The server that answers now; nothing is started. Raises ConfigError where OLLAMA_HOST is no address."""
    if os.environ.get("HAFS_RUNTIME") != "embedded":
        url = ollama_url()
        version = probe(url)
        if version:
            return RuntimeInfo(url, embedded=False, version=version, started=False)
    return find_runtime(root)


def loaded_models(url: str) -> list[str]:
    """What the server at `url` holds in memory; none where it does not say."""
    try:
        answer = httpx.get(f"{url}/api/ps", timeout=PROBE_TIMEOUT_S, trust_env=False)
        return [str(entry["name"]) for entry in answer.raise_for_status().json()["models"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []


def ollama_url() -> str:
    """The address in OLLAMA_HOST, read as Ollama reads it: host, host:port or a URL. Raises ConfigError."""
    text = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'") or DEFAULT_OLLAMA
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host = parts.hostname or "127.0.0.1"
        port = parts.port or ({"http": 80, "https": 443}.get(parts.scheme, 11434) if "://" in text else 11434)
    except ValueError as error:
        raise ConfigError(f"OLLAMA_HOST={text}: {error}", hint="write host:port, such as 127.0.0.1:11434") from error
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # what a server listens on is no address to call
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


def is_of_this_machine(url: str) -> bool:
    """Whether the server at `url` runs here: at a loopback address, or at one that this machine has."""
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(urlsplit(url).hostname, None)}
    except OSError:  # a name that leads nowhere
        return False
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return any(ip_address(address).is_loopback or address in own for address in found)


def probe(url: str) -> str:
    """The version of the server at `url`; "" if none answers there."""
    try:
        answer = httpx.get(f"{url}/api/version", timeout=PROBE_TIMEOUT_S, trust_env=False)
        return str(answer.raise_for_status().json()["version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""


def find_runtime(root: Path) -> RuntimeInfo | None:
    """The embedded runtime that serves `root` now."""
    try:
        info: dict[str, Any] = json.loads((root / "runtime" / "runtime.json").read_bytes())
        writer, url = ProcessId(int(info["pid"]), float(info["create_time"]), str(info["boot_id"])), str(info["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    version = probe(url) if alive(writer) else ""
    return RuntimeInfo(url, embedded=True, version=version, started=False) if version else None


def require_runtime() -> None:
    """Raises MissingExtra where the packages of the embedded runtime are not installed."""
    for package in ("xllamacpp", "aiohttp", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"no Ollama answers and the embedded runtime needs {package}",
                hint='install Ollama, or: pip install "hafs[runtime]"',
            )


def launch_argv(root: Path) -> list[str]:
    command = [sys.executable, "-P", "-m", "trainer_node.cli", "runtime"]
    return [*command, "--root", str(root), "--idle-exit", str(IDLE_EXIT_S)]


def _start(root: Path) -> RuntimeInfo:
    require_runtime()
    folder = root / "runtime"
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "runtime.log"

    def launched() -> "subprocess.Popen[bytes]":
        process = start_detached(launch_argv(root.resolve()), cwd=folder, log=log_file)
        reap(process)
        return process

    process = launched()

    def look() -> RuntimeInfo | None:
        nonlocal process
        ended, found = process.poll(), find_runtime(root)
        if ended not in (None, StoreHeld.exit_code):
            raise _failed(f"ended with code {ended}", log_file)
        if ended is not None and found is None:  # another one holds the root: it is about to answer, or on its way out
            process = launched()
        return found

    wait = Retrying(
        retry=retry_if_result(lambda found: found is None),
        wait=wait_exponential(0.05, max=0.5),
        stop=stop_after_delay(START_TIMEOUT_S),
    )
    try:
        found: RuntimeInfo | None = wait(look)
    except RetryError as error:
        raise _failed(f"did not answer within {START_TIMEOUT_S:.0f} s", log_file) from error
    assert found
    return RuntimeInfo(found.url, embedded=True, version=found.version, started=process.poll() is None)


def _failed(what: str, log_file: Path) -> ProviderUnavailable:
    tail = log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return ProviderUnavailable(f"the embedded runtime {what}:\n{tail}", hint=f"the whole log is {log_file}")
