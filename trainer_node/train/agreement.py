"""Training and serving split the same text into the same tokens, or nothing is trained.

Texts are compared token by token. What the server's template makes of messages is compared by the length of the prompt: once for
each sequence of roles, and for rows that quote a control token, of which the rendered text alone does not tell what was quoted.
A server that cannot tokenize reads a quoted token as a control token: such rows are not held against it.
"""

from collections.abc import Callable, Sequence

from config.errors import JobFailed
from trainer_node.dataset import Encoded
from trainer_node.ollama import OllamaApi

COUNTED_ROWS = 16  # that many prompts are sent, where only their lengths can be compared


def require_agreement(api: OllamaApi, model: str, rows: Sequence[Encoded], told: Callable[[int, int], None]) -> str:
    """Compare the ids of all rows with those of `model` at the runtime; returns what was compared.

    A server without a route to tokenize is sent some prompts, of every sequence of roles one, and asked how long they were.

    Args:
        told: told rows compared and rows in all; what it raises ends it.

    Raises:
        JobFailed: naming the first row that differs, with both id lists or both lengths.
    """
    numbered = list(enumerate(rows, 1))
    plain = [(number, row) for number, row in numbered if not row.quotes]
    quoting = [(number, row) for number, row in numbered if row.quotes]
    shortest = _by_roles(plain)
    if api.tokenize(model, "") is None:
        sent = [*shortest, *(each for each in plain if each not in shortest)][:COUNTED_ROWS]
        _compare_lengths(api, model, sent)
        same = f"{len(sent)} prompts have the same length at the runtime, which has no route to compare tokens"
        return same + (f"; it reads control tokens as such in the {len(quoting)} rows that quote them" if quoting else "")
    before = {lead: api.tokenize(model, lead) or [] for lead in {row.lead for _, row in plain}}
    texts: set[str] = set()
    for done, (number, row) in enumerate(plain):
        told(done, len(plain))
        prompt_and_answers = zip((row.prompt, *row.answers), (row.prompt_ids, *row.answer_ids), strict=True)
        for place, (text, ids) in enumerate(prompt_and_answers):
            expected = [*before[row.lead], *ids] if place else ids
            text = row.lead + text if place else text
            served = api.tokenize(model, text) if text not in texts else expected
            if served != expected:
                raise _disagreement(number, text, f"trained as {expected}, served as {served}")
            texts.add(text)
    _compare_lengths(api, model, [*shortest[:COUNTED_ROWS], *quoting[:COUNTED_ROWS]])
    also = f"; {len(quoting)} more quote control tokens: their prompts have the same length" if quoting else ""
    return f"{len(plain)} rows have the same tokens at the runtime ({len(texts)} texts compared){also}"


def _by_roles(rows: Sequence[tuple[int, Encoded]]) -> list[tuple[int, Encoded]]:
    """The shortest row of each sequence of roles."""
    found: dict[tuple[str, ...], tuple[int, Encoded]] = {}
    for number, row in sorted(rows, key=lambda numbered: len(numbered[1].prompt_ids)):
        found.setdefault(tuple(message.role for message in row.row.messages), (number, row))
    return list(found.values())


def _compare_lengths(api: OllamaApi, model: str, rows: Sequence[tuple[int, Encoded]]) -> None:
    room = max((len(row.prompt_ids) for _, row in rows), default=0) + 64  # one for all: another would load the model again
    for number, row in rows:
        messages = [message.model_dump() for message in row.row.messages]
        reply = api.chat(model, messages, options={"num_predict": 1, "temperature": 0, "num_ctx": room})
        served = int(reply.get("prompt_eval_count", 0))
        if served != len(row.prompt_ids):
            raise _disagreement(number, row.prompt, f"trained with {len(row.prompt_ids)} tokens, served with {served}")


def _disagreement(number: int, text: str, difference: str) -> JobFailed:
    return JobFailed(
        f"row {number} would be trained on other tokens than are served: {difference}; the text is {text[:300]!r}",
        hint="the base's tokenizer or template is not reproduced by this server: use another base or another server version",
    )
