"""SFT: a LoRA on every linear layer learns the answers, token by token, and to end its turn."""

from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from config.contracts.job import JobSpec
from trainer_node.dataset import Encoded
from trainer_node.jobdir import JobDir
from trainer_node.train.device import Device
from trainer_node.train.loop import LengthOrder, TrainingStats, arguments, run
from trainer_node.train.loss import IGNORED, Batch, completion_logps


class CompletionTrainer(SFTTrainer):
    """SFTTrainer with batches by length and a loss that makes logits only where there are labels."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthOrder:
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return LengthOrder(lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean negative log-likelihood of the labelled tokens of all micro-batches of a step."""
        logps, _ = completion_logps(model, Batch(inputs["input_ids"], inputs["attention_mask"], inputs["labels"]))
        return -logps.sum() / (logps.numel() if num_items_in_batch is None else num_items_in_batch)


def train_sft(base: Any, tokenizer: Any, rows: list[Encoded], spec: JobSpec, job_dir: JobDir, device: Device) -> TrainingStats:
    """Train a new adapter on `base`; see `loop.run` for what it leaves and raises."""
    set_seed(spec.train.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules="all-linear",
    )
    columns = {
        "input_ids": [row.prompt_ids + row.answer_ids[0] for row in rows],
        "labels": [[IGNORED] * len(row.prompt_ids) + row.answer_ids[0] for row in rows],
    }
    trainer = CompletionTrainer(
        model=get_peft_model(base, lora),
        args=SFTConfig(**arguments(spec, device, job_dir.checkpoints), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    return run(trainer, job_dir, spec, device)
