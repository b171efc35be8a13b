"""Log-probabilities of completion tokens. Logits are made only where there is a label: the softmax over the vocabulary
of prompt tokens, which nobody reads, would be a third of a step on a CPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trainer_node.dataset import Encoded

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, each (B, T). `labels` are the ids of the answer and IGNORED elsewhere."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def completion_logps(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Natural log-probability of every labelled token, and the row it stands in: two tensors of shape (N,)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    low = causal.lm_head.weight.dtype == torch.bfloat16  # the adapter is always float32: autocast joins the two
    targets = batch.labels[:, 1:]  # (B, T-1)
    labelled = targets != IGNORED
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=low):
        hidden = causal.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        logits = causal.lm_head(hidden[:, :-1][labelled])  # (N, V)
    return -F.cross_entropy(logits.float(), targets[labelled], reduction="none"), labelled.nonzero()[:, 0]


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_id: int, device: str) -> Batch:
    """Pad (prompt ids, answer ids) to the longest of them."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, labels = [], [], []
    for prompt, answer in rows:
        padding = longest - len(prompt) - len(answer)
        ids.append([*prompt, *answer, *[pad_id] * padding])
        mask.append([1] * (longest - padding) + [0] * padding)
        labels.append([IGNORED] * len(prompt) + answer + [IGNORED] * padding)
    return Batch(*(torch.tensor(values, device=device) for values in (ids, mask, labels)))


def answer_scores(model: Any, rows: Sequence[Encoded], answer: int, pad_id: int, batch: int) -> Iterator[tuple[float, int]]:
    """Summed log-probability and number of tokens of the answer with that index, for each row in order."""
    device = str(model.device)
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            part = [(row.prompt_ids, row.answer_ids[answer]) for row in rows[start : start + batch]]
            logps, owner = completion_logps(model, collate(part, pad_id, device))
            sums = torch.zeros(len(part), device=logps.device).index_add(0, owner, logps)
            yield from zip(sums.tolist(), (len(ids) for _, ids in part), strict=True)
