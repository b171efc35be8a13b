"""The child process of an engine: llama.cpp's server, loaded from one request on standard input.

One JSON line in, one JSON line out, then it serves until standard input ends. It imports little: it is started for every load.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from trainer_node.machine import free_memory

PROMPT_CACHE_MIB = 1024  # prompts of earlier requests, kept in memory beside those in the slots


def main() -> None:
    """The child: one JSON line in, one JSON line out, then serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole terminal; the parent ends this process
    request = json.loads(sys.stdin.readline())
    answer: dict[str, Any]
    try:
        server = _load(request)
    except MemoryError as error:
        answer = {"error": str(error), "no_room": True}
    except Exception as error:  # whatever the library raises is the answer
        answer = {"error": str(error) or "llama.cpp refused the file"}
    else:
        answer = {"url": server.listening_address, "gpu": _has_gpu()}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # the library's destructor waits for running generations


def _load(request: dict[str, Any]) -> Any:
    import xllamacpp

    if not Path(request["weights"]).is_file():
        raise FileNotFoundError(f"{request['weights']}: no such file")
    gpu = _has_gpu()
    if not gpu:
        _require_room(request["needed_bytes"])
    params = xllamacpp.CommonParams()
    params.model.path = request["weights"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in request["adapters"]]
    params.n_parallel = request["parallel"]
    params.n_ctx = request["num_ctx"] * request["parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.api_keys = [request["key"]]
    params.ui = params.endpoint_slots = False
    params.verbosity = 1  # errors
    params.fit_params = gpu  # layers that do not fit stay on the CPU; it reads the model twice
    return xllamacpp.Server(params)


def _require_room(needed_bytes: int) -> None:
    available = free_memory()
    if needed_bytes > available:
        need, there = (f"{size / 2**30:.1f} GiB" for size in (needed_bytes, available))
        raise MemoryError(f"model requires more system memory ({need}) than is available ({there})")


def _has_gpu() -> bool:
    import xllamacpp

    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return any(device["type"] != cpu for device in xllamacpp.get_device_info())


if __name__ == "__main__":
    main()
