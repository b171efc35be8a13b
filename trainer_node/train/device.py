"""Device. The dtype follows a measurement of this machine, never its name: bfloat16 is 4 times faster on one CPU and
5 times slower on another of the same size.
"""

import time
from collections.abc import Callable

import psutil
import torch
from pydantic import Field

from config.contracts.base import Tolerant
from trainer_node.machine import cores, free_memory, total_memory

PROBE_S = 0.4  # a dtype
BFLOAT16_GAIN = 1.1  # less is not worth the lower precision


class Device(Tolerant):
    """Where and how the weights are held. `flops` is the measured rate of matrix products a second in `dtype`."""

    kind: str
    dtype: str
    reason: str
    flops: float = Field(gt=0)

    @property
    def weight_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


def probe(rows: int, inner: int, columns: int, dtype: str) -> Device:
    """Measure products of the base's own shapes, (rows, inner) @ (inner, columns), and choose.

    Args:
        dtype: "auto", or what the job asks for, which is then only measured.
    """
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    torch.set_num_threads(min(torch.get_num_threads(), cores()))  # it knows no container's limits, and more would wait in turn
    names = ("float32", "bfloat16") if dtype == "auto" else (dtype,)
    rates = {name: _rate(kind, getattr(torch, name), rows, inner, columns) for name in names}
    measured = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    if dtype != "auto":
        return Device(kind=kind, dtype=dtype, reason=f"the job asks for it ({measured})", flops=rates[dtype])
    chosen = "bfloat16" if rates["bfloat16"] > BFLOAT16_GAIN * rates["float32"] else "float32"
    return Device(kind=kind, dtype=chosen, reason=f"measured here: {measured}", flops=rates[chosen])


def free_memory_mb(kind: str) -> float:
    """Memory that can still be allocated where the model is trained."""
    if kind == "cuda":
        return float(torch.cuda.mem_get_info()[0]) / 2**20
    return free_memory() / 2**20


def total_memory_mb(kind: str) -> float:
    """What free_memory_mb can be at most."""
    if kind == "cuda":
        return float(torch.cuda.mem_get_info()[1]) / 2**20
    return total_memory() / 2**20


def used_memory_mb(kind: str) -> float:
    """Memory this process holds now; its peak where the device keeps one."""
    if kind == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20


def _rate(kind: str, dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """Operations a second."""
    left = torch.ones(rows, inner, dtype=dtype, device=kind)
    right = torch.ones(inner, columns, dtype=dtype, device=kind)
    _timed(kind, lambda: left @ right)  # the first one compiles and allocates
    count, spent = 0, 0.0
    while spent < PROBE_S:
        spent += _timed(kind, lambda: left @ right)
        count += 1
    return 2 * rows * inner * columns * count / spent


def _timed(kind: str, work: Callable[[], torch.Tensor]) -> float:
    """Seconds until the product is really there: an accelerator answers before it has computed."""
    begin = time.perf_counter()
    product = work()
    if kind != "cpu":
        product[0, 0].item()
    return time.perf_counter() - begin
