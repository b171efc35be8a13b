"""The part of training that SFT and DPO share: order, checkpoints, stop, statistics.

The order of rows depends on the seed and the epoch alone, and a checkpoint counts only when it is sealed: a run that
was killed and resumed takes the same steps as one that was not.
"""

import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from config.contracts.base import Tolerant
from config.contracts.job import JobSpec
from config.errors import JobCancelled
from config.files import write_atomic
from trainer_node.jobdir import JobDir
from trainer_node.train.checkpoints import newest_complete, remove_after, seal, step_of
from trainer_node.train.device import Device
from trainer_node.train.metrics import MetricsFile, cut_after, read_metrics

log = logging.getLogger("hafs")
SPENT = "spent.json"  # in a checkpoint: seconds of training up to it, over all attempts
POOL = 50  # batches: rows are sorted by length within so many, so that an epoch is still in random order
LIKE = 8  # tokens: rows this close in length count as equal, so that a batch is not all of one kind (templated rows are)


class TrainingStats(Tolerant):
    """training_stats.json. `train_s` and `tokens` count what led to the adapter, over all attempts."""

    kind: str
    steps: int
    epochs: float
    tokens: int
    train_s: float
    tokens_per_s: float
    first_loss: float
    last_loss: float
    memory_mb: float
    device: str
    dtype: str
    resumed_from: int = 0


def update_steps(rows: int, spec: JobSpec) -> int:
    """Optimizer steps of the whole job, as Trainer counts them."""
    an_epoch = math.ceil(math.ceil(rows / spec.train.batch) / spec.train.accumulation)
    return math.ceil(spec.train.epochs * an_epoch)


def arguments(spec: JobSpec, device: Device, folder: Path) -> dict[str, Any]:
    """What SFTConfig and DPOConfig have in common; every default that TRL gets wrong for us is set here."""
    train = spec.train
    return {
        "output_dir": str(folder),
        "num_train_epochs": train.epochs,
        "per_device_train_batch_size": train.batch,
        "gradient_accumulation_steps": train.accumulation,
        "learning_rate": train.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": train.warmup_steps,
        "seed": train.seed,
        "max_length": None,  # rows that are too long were dropped and counted
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "save_total_limit": 2,  # the one before is the way back if the newest is torn
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would report NaN as the last good loss
        "include_num_input_tokens_seen": "non_padding",
        "activation_checkpointing": False,  # costs a fifth of the speed; small adapters have the memory
        "bf16": device.dtype == "bfloat16",
        "use_cpu": device.kind == "cpu",
        "dataloader_pin_memory": device.kind == "cuda",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run(trainer: Any, job_dir: JobDir, spec: JobSpec, device: Device) -> TrainingStats:
    """Train from the newest whole checkpoint to the end, save the adapter and the statistics.

    Raises:
        JobCancelled: the stop file was found; everything up to its step is in a checkpoint.
        JobFailed: the loss is no number any more.
    """
    checkpoint = newest_complete(job_dir.checkpoints)
    step = step_of(checkpoint)
    remove_after(job_dir.checkpoints, step)
    cut_after(job_dir.metrics_file, step)
    if checkpoint:
        log.info("going on from the checkpoint of step %d", step)
    spent_s = json.loads((checkpoint / SPENT).read_bytes())["train_s"] if checkpoint else 0.0
    keeper = CheckpointKeeper(job_dir, spent_s)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsFile(job_dir.metrics_file, device.kind))
    trainer.add_callback(keeper)
    if checkpoint is None or not _take_up_finished(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise JobCancelled(f"stopped at step {state.global_step} of {state.max_steps}", hint="the checkpoint is kept")
    _save_adapter(trainer.model, job_dir.adapter)
    lines = read_metrics(job_dir.metrics_file)
    stats = TrainingStats(
        kind=spec.kind,
        steps=state.global_step,
        epochs=state.epoch,
        tokens=state.num_input_tokens_seen,
        train_s=keeper.spent(),
        tokens_per_s=state.num_input_tokens_seen / keeper.spent(),
        first_loss=lines[0].loss or 0.0,
        last_loss=lines[-1].loss or 0.0,
        memory_mb=max(line.memory_mb or 0.0 for line in lines),
        device=device.kind,
        dtype=device.dtype,
        resumed_from=step,
    )
    write_atomic(job_dir.path / "training_stats.json", stats.model_dump_json(indent=1).encode())
    return stats


def _take_up_finished(trainer: Any, checkpoint: Path) -> bool:
    """Load a checkpoint that holds the last step; False for an earlier one. Trainer would take one step more in a part epoch."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        return False
    trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)
    trainer.state = state
    return True


class CheckpointKeeper(TrainerCallback):
    """Seals what Trainer saved, and stops after the step at which the stop file is seen."""

    def __init__(self, job_dir: JobDir, spent_s: float) -> None:
        self.job_dir, self.before_s = job_dir, spent_s
        self.begin = time.monotonic()

    def spent(self) -> float:
        """Seconds of training up to now, those of earlier attempts included."""
        return self.before_s + time.monotonic() - self.begin

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.begin = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stop = self.job_dir.stop_file.exists()
        if stop or state.global_step >= state.max_steps:
            control.should_save = True
        if stop:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = self.job_dir.checkpoints / f"checkpoint-{state.global_step}"
        write_atomic(folder / SPENT, json.dumps({"train_s": self.spent()}).encode())
        seal(folder)


class LengthOrder(Sampler[int]):
    """Rows of like length stand together; which ones, and in which order the batches come, is drawn anew each epoch."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}:{self.epoch}")
        rows = draw.sample(range(len(self.lengths)), len(self.lengths))
        pools = _chunks(rows, POOL * self.batch)
        batches = [batch for pool in pools for batch in _chunks(sorted(pool, key=self._rough_length), self.batch)]
        whole = [batch for batch in batches if len(batch) == self.batch]
        rest = [batch for batch in batches if len(batch) < self.batch]  # at most one: it has to stay last
        draw.shuffle(whole)
        return (row for batch in whole + rest for row in batch)

    def _rough_length(self, row: int) -> int:
        return self.lengths[row] // LIKE


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _save_adapter(model: Any, target: Path) -> None:
    """Only the trained adapter (DPO also holds a frozen `ref`), whole or not at all."""
    partial = target.with_name("adapter.partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(partial, selected_adapters=["default"], save_embedding_layers=False)
    seal(partial)
    os.replace(partial, target)
