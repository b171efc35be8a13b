"""Plan of a job: what will be trained, how large and how long, told before anything heavy is loaded.

Memory and time are estimates from the base's header and one measurement; disk and memory that do not suffice stop the job.
"""

import shutil
from pathlib import Path

from config.contracts.base import Tolerant
from config.contracts.job import JobSpec
from config.errors import DiskFull, JobFailed
from trainer_node.dataset import Prepared
from trainer_node.train.base import BaseModel
from trainer_node.train.device import Device, free_memory_mb, total_memory_mb
from trainer_node.train.loop import update_steps

PROCESS_MB = 900  # Python with torch, transformers and TRL
OPTIMIZER_BYTES = 16  # a trained parameter in float32: itself, its gradient, two moments of Adam
CHECKPOINTS = 3  # two are kept, a third is being written
SHARE_OF_PEAK = 0.35  # of the measured rate of matrix products; the rest is attention, softmax and the optimizer


class Plan(Tolerant):
    """plan.json. Sizes in MB (2**20 bytes), times in seconds."""

    kind: str
    base: str
    base_sha256: str
    train_rows: int
    held_out_rows: int
    train_sources: int
    held_out_sources: int
    dropped: dict[str, int]
    tokens_an_epoch: int
    longest_row: int
    epochs: float
    steps: int
    parameters: int
    trainable_parameters: int
    device: Device
    memory_mb: float
    memory_free_mb: float
    memory_total_mb: float = 0.0
    disk_mb: float
    disk_free_mb: float
    train_s: float
    registers: str


def make_plan(spec: JobSpec, base: BaseModel, data: Prepared, rank: int, device: Device, root: Path, registers: str) -> Plan:
    """`rank` is the adapter's, which for a dpo job is that of the model it starts from."""
    trainable = base.lora_parameters(rank)
    longest = max(row.longest for row in data.train + data.held_out)
    tokens = sum(row.tokens for row in data.train)
    return Plan(
        kind=spec.kind,
        base=base.name,
        base_sha256=base.sha256,
        train_rows=len(data.train),
        held_out_rows=len(data.held_out),
        train_sources=len({row.row.source_id for row in data.train}),
        held_out_sources=len({row.row.source_id for row in data.held_out}),
        dropped=data.dropped,
        tokens_an_epoch=tokens,
        longest_row=longest,
        epochs=spec.train.epochs,
        steps=update_steps(len(data.train), spec),
        parameters=base.parameters,
        trainable_parameters=trainable,
        device=device,
        memory_mb=_memory_mb(spec, base, trainable, longest, device),
        memory_free_mb=free_memory_mb(device.kind),
        memory_total_mb=total_memory_mb(device.kind),
        disk_mb=CHECKPOINTS * trainable * OPTIMIZER_BYTES / 2**20,
        disk_free_mb=shutil.disk_usage(root).free / 2**20,
        train_s=4 * base.parameters * tokens * spec.train.epochs / (device.flops * SHARE_OF_PEAK),
        registers=registers,
    )


def require_context(plan: Plan, base: BaseModel) -> None:
    """Raises JobFailed where a row is longer than what the base was made for."""
    if plan.longest_row > base.context:
        raise JobFailed(
            f"the longest row has {plan.longest_row} tokens, {base.name} reads {base.context}",
            hint=f"submit with train.max_length = {base.context} or less: longer rows are left out",
        )


def require_room(plan: Plan) -> None:
    """Raises DiskFull or JobFailed where the estimate is above what is free; on a GPU above what there is: it comes free."""
    if plan.disk_mb > plan.disk_free_mb:
        raise DiskFull(
            f"the checkpoints need {plan.disk_mb:.0f} MB, {plan.disk_free_mb:.0f} MB are free on the node",
            hint="free some space on the node; if the job has failed by then, submit it again",
        )
    smaller = "submit with a smaller train.batch (and more train.accumulation)"
    needs = f"training needs about {plan.memory_mb:.0f} MB of memory"
    if plan.device.kind == "cuda":
        if plan.memory_mb > plan.memory_total_mb:
            raise JobFailed(f"{needs}, the GPU has {plan.memory_total_mb:.0f} MB", hint=smaller)
    elif plan.memory_mb > plan.memory_free_mb:
        raise JobFailed(f"{needs}, {plan.memory_free_mb:.0f} MB are free", hint=f"close what holds memory, or {smaller}")


def plan_lines(plan: Plan) -> list[str]:
    """The plan in words, a line a topic."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in plan.dropped.items()) or "none"
    return [
        f"rows: {plan.train_rows} to train on, {plan.held_out_rows} held out"
        f" ({plan.train_sources} and {plan.held_out_sources} source facts); dropped: {dropped}",
        f"tokens: {plan.tokens_an_epoch} an epoch, the longest row has {plan.longest_row}",
        f"steps: {plan.steps} ({plan.epochs:g} epochs)",
        f"parameters: {plan.trainable_parameters:,} trainable of {plan.parameters:,} ({plan.base})",
        f"device: {plan.device.kind}, {plan.device.dtype}: {plan.device.reason}",
        f"memory: about {plan.memory_mb:.0f} MB of {plan.memory_free_mb:.0f} MB free; "
        f"disk: {plan.disk_mb:.0f} MB of {plan.disk_free_mb:.0f} MB free",
        f"time: about {plan.train_s:.0f} s of training",
        f"registers: {plan.registers}",
    ]


def _memory_mb(spec: JobSpec, base: BaseModel, trainable: int, longest: int, device: Device) -> float:
    """Peak: weights, optimizer, one batch."""
    sequences = spec.train.batch * (2 if spec.kind == "dpo" else 1)
    a_token = base.layers * (16 * base.hidden + 4 * base.feed_forward) * 4 + 3 * 4 * base.vocabulary
    training = device.weight_bytes * base.parameters + OPTIMIZER_BYTES * trainable + sequences * longest * a_token
    return PROCESS_MB + training / 2**20
