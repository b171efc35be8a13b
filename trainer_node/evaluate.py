"""Evaluation on the held-out rows. Every figure compares the same rows under two models that share their weights:
the base (adapter off) and the tuned one, or the reference (the adapter a DPO job started from) and the tuned one.
"""

import math
from collections.abc import Sequence
from typing import Any

from config.contracts.base import Tolerant
from config.contracts.job import PairScores, Perplexity
from trainer_node.dataset import Encoded
from trainer_node.train.loss import answer_scores

REFERENCE = "reference"  # name of the frozen adapter a DPO job started from
TUNED = "default"
CHOSEN, REJECTED = 0, 1


class Evaluation(Tolerant):
    """evaluation.json"""

    perplexity: Perplexity
    pairs: PairScores | None = None


def evaluate(model: Any, held_out: Sequence[Encoded], pad_id: int, batch: int, beta: float | None = None) -> Evaluation:
    """Perplexity of the (chosen) answers, and with `beta` the scores of the pairs.

    Args:
        model: a PeftModel with the tuned adapter active; for pairs it also holds the adapter REFERENCE.
        beta: of DPO; None for an SFT job.
    """
    model.eval()
    rows = sorted(held_out, key=lambda row: row.longest)  # less padding
    tuned = list(answer_scores(model, rows, CHOSEN, pad_id, batch))
    with model.disable_adapter():
        base = list(answer_scores(model, rows, CHOSEN, pad_id, batch))
    perplexity = Perplexity(
        rows=len(rows), tokens=sum(tokens for _, tokens in tuned), base=_perplexity(base), tuned=_perplexity(tuned)
    )
    if beta is None:
        return Evaluation(perplexity=perplexity)
    chosen, rejected = _logps(tuned), _logps(answer_scores(model, rows, REJECTED, pad_id, batch))
    model.set_adapter(REFERENCE, inference_mode=True)
    reference = [_logps(answer_scores(model, rows, answer, pad_id, batch)) for answer in (CHOSEN, REJECTED)]
    model.set_adapter(TUNED, inference_mode=True)
    return Evaluation(perplexity=perplexity, pairs=pair_scores(chosen, rejected, reference[0], reference[1], beta))


def pair_scores(
    chosen: Sequence[float],
    rejected: Sequence[float],
    reference_chosen: Sequence[float],
    reference_rejected: Sequence[float],
    beta: float,
) -> PairScores:
    """Scores from summed log-probabilities of whole answers, one a pair. See PairScores for the definitions."""
    count = len(chosen)
    likelier = [good - bad for good, bad in zip(chosen, rejected, strict=True)]
    likelier_reference = [good - bad for good, bad in zip(reference_chosen, reference_rejected, strict=True)]
    margins = [beta * (tuned - before) for tuned, before in zip(likelier, likelier_reference, strict=True)]
    return PairScores(
        pairs=count,
        reward_accuracy=sum(margin > 0 for margin in margins) / count,
        reward_margin=sum(margins) / count,
        chosen_likelier=sum(gap > 0 for gap in likelier) / count,
        chosen_likelier_reference=sum(gap > 0 for gap in likelier_reference) / count,
    )


def _logps(scores: Any) -> list[float]:
    return [logp for logp, _ in scores]


def _perplexity(scores: Sequence[tuple[float, int]]) -> float:
    return math.exp(-sum(logp for logp, _ in scores) / sum(tokens for _, tokens in scores))
