"""What a job has to itself: one GPU, or, on a machine without, the machine. The devices are counted without torch.

A lease is three things: a row with job and fence in the database (trainer_node/queue.py), a lock file that the operating system
frees when the last process of the job's tree is gone, and the fence, which every process of the attempt carries: whoever finds
another one in the row has been given up, and writes nothing more.
"""

import os
import re
from pathlib import Path

CPU = "cpu"
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


def devices() -> list[str]:
    """`gpu0`, `gpu1`, … as NVIDIA's driver numbers them, or those that CUDA_VISIBLE_DEVICES names; without any, `cpu`."""
    named = os.environ.get(VISIBLE)
    numbers = [str(number) for number in range(_count_gpus())] if named is None else _listed(named)
    return [f"gpu{number}" for number in numbers] or [CPU]


def environment(device: str) -> dict[str, str]:
    """What a process must have in its environment to see this device alone."""
    if device == CPU:
        return {}
    order = {} if VISIBLE in os.environ else {ORDER: "PCI_BUS_ID"}  # as the driver numbers them
    return {VISIBLE: device.removeprefix("gpu"), **order}


def device_lock(root: Path, device: str) -> Path:
    """The lock file of a device."""
    return root / "leases" / (re.sub(r"[^A-Za-z0-9_.-]", "-", device) + ".lock")


def _listed(named: str) -> list[str]:
    """CUDA reads the list up to the first entry that names nothing: an empty one, or a negative number."""
    found: list[str] = []
    for part in map(str.strip, named.split(",")):
        if not part or part.startswith("-"):
            break
        found.append(part)
    return found


def _count_gpus() -> int:
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return 0
    except pynvml.NVMLError:  # no driver, no card
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
