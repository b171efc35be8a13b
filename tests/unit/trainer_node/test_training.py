"""What is trained: the ids of a row, the loss on its answer alone, the figures of the plan and of the evaluation."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from config.contracts.job import JobSpec, Metrics, TrainOptions
from config.contracts.sample import Message
from config.errors import DiskFull, JobFailed
from tests.fakes.tiny_model import smollm2_gguf, write_tiny_model
from trainer_node.dataset import Encoded, Prepared, Row
from trainer_node.evaluate import evaluate, pair_scores
from trainer_node.train.base import BaseModel, load_model, load_tokenizer, read_base, special_tokens
from trainer_node.train.device import Device
from trainer_node.train.encode import encode
from trainer_node.train.loop import update_steps
from trainer_node.train.loss import answer_scores, collate, completion_logps
from trainer_node.train.metrics import MetricsFile
from trainer_node.train.plan import make_plan, plan_lines, require_context, require_room

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers so

SYSTEM, USER = Message(role="system", content="Be brief."), Message(role="user", content="Why?")
DEVICE = Device(kind="cpu", dtype="float32", reason="measured", flops=1e9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base(write_tiny_model(tmp_path_factory.mktemp("base") / "tiny.gguf"))


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> Any:
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def tuned(base: BaseModel) -> Any:
    torch.manual_seed(1)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(load_model(base, "float32", "cpu", longest=64), options).eval()


def encoded(tokenizer: Any, source: str, *answers: str) -> Encoded:
    return encode(tokenizer, Row(source, (SYSTEM, USER), answers or (f"It is {source}.",)))


def spec(**train: object) -> JobSpec:
    return JobSpec(kind="sft", name="m", base="b", data=["d"], train=TrainOptions.model_validate(train))


def test_a_row_is_the_rendered_chat_up_to_the_end_of_turn(tokenizer: Any) -> None:
    row = encoded(tokenizer, "x", "Because.")
    chat = [SYSTEM.model_dump(), USER.model_dump(), {"role": "assistant", "content": "Because."}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(row.prompt_ids + row.answer_ids[0]) + "\n" == whole
    assert row.answer_ids[0][-1] == tokenizer.eos_token_id
    assert row.prompt_ids.count(tokenizer.eos_token_id) == 2
    assert row.longest == row.tokens == len(row.prompt_ids) + len(row.answer_ids[0])


def test_a_template_that_changes_the_answer_is_refused(base: BaseModel) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(JobFailed, match="chat template"):
        encoded(tokenizer, "x", "Because.")


def test_control_tokens_are_known(tokenizer: Any) -> None:
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(special_tokens(tokenizer))


def test_logps_are_those_of_the_whole_model_on_the_answer(tuned: Any, tokenizer: Any) -> None:
    rows = [encoded(tokenizer, "x", "Because."), encoded(tokenizer, "y", "It is so, and it will be so.")]
    batch = collate([(row.prompt_ids, row.answer_ids[0]) for row in rows], tokenizer.pad_token_id, "cpu")
    logps, owner = completion_logps(tuned, batch)
    assert owner.bincount().tolist() == [len(row.answer_ids[0]) for row in rows]
    for number, row in enumerate(rows):
        alone = torch.tensor([row.prompt_ids + row.answer_ids[0]])
        every = tuned(input_ids=alone).logits[0].log_softmax(-1)[:-1].gather(1, alone[0, 1:, None])[:, 0]
        expected = every[len(row.prompt_ids) - 1 :]
        assert torch.allclose(logps[owner == number], expected, atol=1e-4)
    sums = [total for total, _ in answer_scores(tuned, rows, 0, tokenizer.pad_token_id, 1)]
    assert sums == pytest.approx([logps[owner == number].sum().item() for number in (0, 1)], abs=1e-3)


def test_perplexity_compares_the_adapter_with_the_base(tuned: Any, tokenizer: Any) -> None:
    rows = [encoded(tokenizer, "x"), encoded(tokenizer, "y", "No.")]
    found = evaluate(tuned, rows, tokenizer.pad_token_id, 2).perplexity
    scores = list(answer_scores(tuned, rows, 0, tokenizer.pad_token_id, 1))
    assert found.tokens == sum(len(row.answer_ids[0]) for row in rows)
    assert found.tuned == pytest.approx(math.exp(-sum(logp for logp, _ in scores) / found.tokens), rel=1e-4)
    with tuned.disable_adapter():
        plain = list(answer_scores(tuned, rows, 0, tokenizer.pad_token_id, 1))
    assert found.base == pytest.approx(math.exp(-sum(logp for logp, _ in plain) / found.tokens), rel=1e-4)
    assert found.base != pytest.approx(found.tuned, rel=0.01)


def test_pair_scores_by_hand() -> None:
    """Pair 1 gains 3 and was already right; pair 2 gains 1 and stays wrong; pair 3 loses 2."""
    scores = pair_scores([-1.0, -5.0, -4.0], [-5.0, -4.0, -4.5], [-2.0, -6.0, -3.0], [-3.0, -4.0, -5.5], beta=0.1)
    assert scores.pairs == 3
    assert scores.reward_accuracy == pytest.approx(2 / 3)
    assert scores.reward_margin == pytest.approx(0.1 * (3 + 1 - 2) / 3)
    assert scores.chosen_likelier == pytest.approx(2 / 3)
    assert scores.chosen_likelier_reference == pytest.approx(2 / 3)


def test_the_plan_counts_what_peft_trains(base: BaseModel, tuned: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = Prepared([encoded(tokenizer, f"s{number}") for number in range(20)], [encoded(tokenizer, "h")], {"duplicate": 3})
    plan = make_plan(spec(epochs=2, batch=8), base, data, 4, DEVICE, tmp_path, "m:v1")
    assert plan.trainable_parameters == sum(part.numel() for part in tuned.parameters() if part.requires_grad)
    assert plan.steps == 6
    assert (plan.train_rows, plan.held_out_rows, plan.train_sources) == (20, 1, 20)
    text = "\n".join(plan_lines(plan))
    assert "dropped: 3 duplicate" in text
    assert "6 (2 epochs)" in text
    require_context(plan, base)
    with pytest.raises(JobFailed, match=f"has {plan.longest_row} tokens, .* reads {plan.longest_row - 1}"):
        require_context(plan, replace(base, context=plan.longest_row - 1))
    require_room(plan)
    with pytest.raises(JobFailed, match="MB of memory"):
        require_room(plan.model_copy(update={"memory_free_mb": 10}))
    on_gpu = plan.model_copy(update={"device": DEVICE.model_copy(update={"kind": "cuda"}), "memory_free_mb": 10})
    require_room(on_gpu)  # it is waited for
    with pytest.raises(JobFailed, match="the GPU has 20 MB"):
        require_room(on_gpu.model_copy(update={"memory_total_mb": 20}))
    with pytest.raises(DiskFull):
        require_room(plan.model_copy(update={"disk_free_mb": 0}))


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps"), [(20, 8, 1, 2, 6), (20, 8, 2, 1, 2), (16, 8, 1, 0.5, 1)]
)
def test_steps(rows: int, batch: int, accumulation: int, epochs: float, steps: int) -> None:
    assert update_steps(rows, spec(batch=batch, accumulation=accumulation, epochs=epochs)) == steps


def test_the_header_of_a_real_base() -> None:
    base = read_base(smollm2_gguf())
    assert (base.layers, base.hidden, base.feed_forward, base.vocabulary, base.context) == (30, 576, 1536, 49152, 8192)
    assert base.lora_parameters(16) == 4_884_480


def test_what_cannot_be_trained_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"smollm", b"qwen99"))
    with pytest.raises(JobFailed, match="qwen99"):
        read_base(path)
    path.write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gpt42"))
    with pytest.raises(JobFailed, match="gpt42"):
        read_base(path)
    path.write_bytes(b"junk")
    with pytest.raises(JobFailed, match="not a GGUF"):
        read_base(path)


@pytest.mark.parametrize("logs", [{"loss": math.nan, "grad_norm": 1.0}, {"loss": 1.0, "grad_norm": math.inf}])
def test_a_loss_that_is_no_number_ends_the_job(tmp_path: Path, logs: dict[str, float]) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    metrics = MetricsFile(tmp_path / "metrics.jsonl", "cpu")
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=3, max_steps=9, epoch=0.5)
    metrics.on_train_begin(args, state, control)
    with pytest.raises(JobFailed, match="at step 3 of 9"):
        metrics.on_log(args, state, control, logs)
    assert Metrics.model_validate_json((tmp_path / "metrics.jsonl").read_bytes()).step == 3
