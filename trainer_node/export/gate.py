"""Smoke gate: a tuned model that is not served as it was trained, does not end its turn or is worse than its base is never given
an alias. All faults are told at once.
"""

from collections.abc import Iterator
from typing import Any

from config.contracts.job import Perplexity
from config.errors import BadRequest, GateFailed
from trainer_node.export.probes import STEPS, Probe, Probes
from trainer_node.ollama import OllamaApi

MAX_TOKENS = 128
TRAIN_MORE = "train longer, or on more rows"
OTHER_TEMPLATE = "the server renders another template: use another server version, or a base whose own template it keeps"
REFUSED = "look into the server's log: it took the model and cannot answer with it"
OTHER_WEIGHTS = "the exported weights are not the trained ones: take a less coarse quantization, or the adapter route"


def require_gate(api: OllamaApi, tag: str, probes: Probes, perplexity: Perplexity, *, exact: bool) -> str:
    """Ask the registered model the probes; tells its answer to the first.

    The first is asked as it was trained, and again without its system message, as a person would: the registered one has to take
    its place. It has to come to an end; of the others only the beginning is looked at.

    Args:
        exact: the served weights are the trained ones (an adapter, F16), so answers have to be the same; else the first token has
            to be one of the likeliest.

    Raises:
        GateFailed: with all that was wrong and what was answered.
    """
    faults = list(_worse(perplexity))
    answers = []
    for number, probe in enumerate(probes.probes):
        for messages in _ways(probe) if number == 0 else [_plain(probe)]:
            options = {"num_predict": STEPS if number else MAX_TOKENS, "temperature": 0, "seed": 0}
            try:
                reply = api.chat(tag, messages, options=options)
            except BadRequest as error:
                faults.append((f"the server refuses to answer: {error}", REFUSED))
                continue
            answers.append(_text(reply))
            faults += _faults(reply, probe, probes.special, whole=number == 0, exact=exact)
    if faults:
        told = list(dict.fromkeys(reason for reason, _ in faults))
        hint = "; ".join(dict.fromkeys(hint for _, hint in faults))
        raise GateFailed(
            f"{tag} did not pass the smoke gate: {'; '.join(told)}", hint=f"{hint}; the files are kept, no alias was moved"
        )
    return answers[0]


def _worse(figures: Perplexity) -> Iterator[tuple[str, str]]:
    if not figures.tuned <= figures.base:  # also where it is no number
        yield (
            f"its held-out perplexity is {figures.tuned:.2f}, that of the base {figures.base:.2f}",
            "train with a lower learning rate, or on data that is more alike",
        )


def _faults(reply: dict[str, Any], probe: Probe, special: list[str], *, whole: bool, exact: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with a reply, and what to do about it."""
    text, served = _text(reply), int(reply.get("prompt_eval_count", 0))
    if served != probe.prompt_tokens:
        yield (
            f"the server read {served} prompt tokens, the same messages were trained with {probe.prompt_tokens}",
            OTHER_TEMPLATE,
        )
    if whole and reply.get("done_reason") != "stop":
        yield f"it did not end its turn within {MAX_TOKENS} tokens: {text!r}", TRAIN_MORE
    if leaked := [token for token in special if token in text]:
        yield f"template tokens in its answer ({', '.join(leaked)}): {text!r}", TRAIN_MORE
    if whole and not text.strip():
        yield "its answer is empty", TRAIN_MORE
    if served == probe.prompt_tokens and not _agrees(text, probe, exact):
        wanted = repr(probe.greedy) if exact else f"one of {', '.join(map(repr, probe.first))}"
        yield f"it was trained to begin with {wanted}, and is served as {text[:80]!r}", OTHER_WEIGHTS


def _agrees(text: str, probe: Probe, exact: bool) -> bool:
    """Blanks at the ends are left aside: tokenizers and servers treat them in ways of their own."""
    begin = text.strip()
    if exact:
        return begin == probe.greedy.strip() if probe.ended else begin.startswith(probe.greedy.strip())
    return not probe.first or any(begin.startswith(_whole(each)) if each else not begin for each in probe.first)


def _whole(token: str) -> str:
    """The text of a token as far as it tells something alone: a character of several tokens begins with a piece of one."""
    return token.partition("\ufffd")[0].strip()


def _ways(probe: Probe) -> list[list[dict[str, str]]]:
    """With the system message and, where there is one, without it."""
    said = _plain(probe)
    bare = [message for message in said if message["role"] != "system"]
    return [said] if bare == said else [bare, said]


def _plain(probe: Probe) -> list[dict[str, str]]:
    return [message.model_dump() for message in probe.messages]


def _text(reply: dict[str, Any]) -> str:
    return str(reply["message"]["content"])
