"""Metrics file. One line a step, no step twice: what a lost attempt wrote after its last checkpoint is cut on resume."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from config.contracts.job import Metrics
from config.errors import JobFailed
from config.files import write_atomic
from trainer_node.train.device import used_memory_mb

log = logging.getLogger("hafs")


def cut_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`."""
    if path.exists():
        kept = [
            line for line in path.read_bytes().splitlines(keepends=True) if (number := _step(line)) is not None and number <= step
        ]
        write_atomic(path, b"".join(kept))


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl and the lines a person reads; stops at the first loss or gradient that is no number."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.peak_mb = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.begin = self.last = time.monotonic()
        self.first_step, self.tokens = state.global_step, state.num_input_tokens_seen

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:  # the summary that Trainer logs at the end
            return
        metrics = self._measure(state, logs)
        with self.path.open("ab") as file:
            file.write(metrics.model_dump_json(exclude_none=True).encode() + b"\n")
        log.info(_readable(metrics))
        for name, value in (("loss", metrics.loss), ("gradient", metrics.grad_norm)):
            if value is not None and not math.isfinite(value):
                raise JobFailed(
                    f"the {name} became {value} at step {metrics.step} of {metrics.steps}: the training has diverged",
                    hint='submit it again with a lower learning rate (train.lr), or with train.dtype = "float32"',
                )

    def _measure(self, state: TrainerState, logs: dict[str, float]) -> Metrics:
        now = time.monotonic()
        rate = (state.num_input_tokens_seen - self.tokens) / max(now - self.last, 1e-9)
        self.last, self.tokens = now, state.num_input_tokens_seen
        self.peak_mb = max(self.peak_mb, used_memory_mb(self.device))
        step_s = (now - self.begin) / max(state.global_step - self.first_step, 1)
        return Metrics(
            time=time.time(),
            step=state.global_step,
            steps=state.max_steps,
            epoch=state.epoch or 0.0,
            loss=logs["loss"],
            lr=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens_per_s=rate,
            memory_mb=self.peak_mb,
            eta_s=step_s * (state.max_steps - state.global_step),
            extra={name: value for name, value in logs.items() if name.startswith("rewards/")},
        )


def read_metrics(path: Path) -> list[Metrics]:
    return [Metrics.model_validate_json(line) for line in path.read_bytes().splitlines()]


def _readable(metrics: Metrics) -> str:
    rewards = "".join(f"  {name.removeprefix('rewards/')} {value:.3f}" for name, value in metrics.extra.items())
    return (
        f"step {metrics.step}/{metrics.steps}  loss {metrics.loss:.4f}{rewards}  {metrics.tokens_per_s:.0f} tokens/s"
        f"  {metrics.memory_mb:.0f} MB  {metrics.eta_s:.0f} s left"
    )


def _step(line: bytes) -> int | None:
    """The step of a whole line; None for what a crash cut off."""
    try:
        return Metrics.model_validate_json(line).step if line.endswith(b"\n") else None
    except ValidationError:
        return None
