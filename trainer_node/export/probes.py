"""Probes of the smoke gate: what the trained model itself answers, noted while it is in memory. The server has to say the same.

A greedy answer is noted up to its first token that is no clear choice: there another program's arithmetic may fall to the
other side, and that is no fault.
"""

import logging
from collections.abc import Sequence
from typing import Any

from config.contracts.base import Tolerant
from config.contracts.sample import Message
from trainer_node.train.encode import render_prompt, token_ids

STEPS = 8  # tokens of the greedy answer
CLEAR = 0.7  # nats between the first two choices: one is twice as likely
FIRST = 5
OTHERS = 2  # probes from held-out rows

log = logging.getLogger("hafs")


class Probe(Tolerant):
    """`prompt_tokens`: length of the prompt as it was trained. `greedy` is what the answer has to begin with (all of it where it
    `ended`); `first` are the texts of the likeliest first tokens, "" for the end.
    """

    messages: list[Message]
    prompt_tokens: int
    greedy: str = ""
    ended: bool = False
    first: list[str] = []


class Probes(Tolerant):
    """probes.json: the job's own question first. `special` are the tokens that may appear in no answer."""

    probes: list[Probe]
    special: list[str]


def ask(model: Any, tokenizer: Any, messages: Sequence[Message]) -> Probe:
    """What `model` (of transformers, adapter active) answers to `messages`, token by token."""
    import torch

    ids = token_ids(tokenizer, render_prompt(tokenizer, messages))
    probe = Probe(messages=list(messages), prompt_tokens=len(ids))
    answer: list[int] = []
    sure: int | None = None
    first: list[str] = []
    ended = False
    model.eval()
    with torch.no_grad():
        for _ in range(STEPS):
            seen = torch.tensor([[*ids, *answer]], device=model.device)  # (1, T)
            best = torch.log_softmax(model(input_ids=seen).logits[0, -1].float(), -1).topk(FIRST)  # (FIRST,)
            if not first:
                first = ["" if each == tokenizer.eos_token_id else tokenizer.decode([each]) for each in best.indices.tolist()]
            if sure is None and float(best.values[0] - best.values[1]) < CLEAR:
                sure = len(answer)
            token = int(best.indices[0])
            if token == tokenizer.eos_token_id:
                ended = sure is None
                break
            answer.append(token)
    text = str(tokenizer.decode(answer[:sure], skip_special_tokens=True)).rstrip("\ufffd")  # half a character at its end
    return probe.model_copy(update={"greedy": text, "ended": ended, "first": first})
