"""DPO: the SFT adapter goes on learning which of two answers is the better one; the reference is that adapter, frozen.

Reference log-probabilities are computed once, before the first step, so the first loss is log 2 (bfloat16: within 0.01).
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from config.contracts.job import JobSpec
from trainer_node.dataset import Encoded
from trainer_node.jobdir import JobDir
from trainer_node.train.device import Device
from trainer_node.train.loop import LengthOrder, TrainingStats, arguments, run


class PairTrainer(DPOTrainer):
    """DPOTrainer on pairs that are tokenized already, in batches by length."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthOrder:
        columns = (self.train_dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in zip(*columns, strict=True)]
        return LengthOrder(lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed)


def train_dpo(
    base: Any, start: Path, tokenizer: Any, pairs: list[Encoded], spec: JobSpec, job_dir: JobDir, device: Device
) -> TrainingStats:
    """Train on from the adapter in the folder `start`; see `loop.run` for what it leaves and raises."""
    set_seed(spec.train.seed)
    columns = {
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.answer_ids[0] for pair in pairs],
        "rejected_ids": [pair.answer_ids[1] for pair in pairs],
    }
    trainer = PairTrainer(
        model=PeftModel.from_pretrained(base, start, is_trainable=True),
        args=DPOConfig(**arguments(spec, device, job_dir.checkpoints), beta=spec.dpo.beta, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    return run(trainer, job_dir, spec, device)
