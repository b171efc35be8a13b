"""Training and serving split the same text into the same tokens, or nothing is trained.

Of a row whose messages quote a control token the rendered text alone does not tell what was quoted, so its messages are sent and
the lengths compared. A server that cannot tokenize reads a quoted token as a control token: such rows are not held against it.
"""

from collections.abc import Sequence

from config.errors import JobFailed
from trainer_node.dataset import Encoded
from trainer_node.ollama import OllamaApi

COUNTED_ROWS = 16  # that many prompts are sent, where only their lengths can be compared


def require_agreement(api: OllamaApi, model: str, rows: Sequence[Encoded]) -> str:
    """Compare the ids of all rows with those of `model` at the runtime; tells what was compared.

    A server without a route to tokenize is sent some of the prompts and asked how long they were.

    Raises:
        JobFailed: naming the first row that differs, with both id lists or both lengths.
    """
    numbered = list(enumerate(rows, 1))
    plain = [(number, row) for number, row in numbered if not row.quotes]
    quoting = [(number, row) for number, row in numbered if row.quotes]
    first = api.tokenize(model, "")  # what the server puts before every text
    if first is None:
        _compare_lengths(api, model, plain[:COUNTED_ROWS])
        told = f"{len(plain[:COUNTED_ROWS])} prompts have the same length at the runtime, which has no route to compare tokens"
        return told + (f"; it reads control tokens as such in the {len(quoting)} rows that quote them" if quoting else "")
    texts: set[str] = set()
    for number, row in plain:
        prompt_and_answers = zip((row.prompt, *row.answers), (row.prompt_ids, *row.answer_ids), strict=True)
        for place, (text, ids) in enumerate(prompt_and_answers):
            expected = [*first, *ids] if place else ids
            served = api.tokenize(model, text) if text not in texts else expected
            if served != expected:
                raise _disagreement(number, text, f"trained as {expected}, served as {served}")
            texts.add(text)
    _compare_lengths(api, model, quoting[:COUNTED_ROWS])
    also = f"; {len(quoting)} more quote control tokens: their prompts have the same length" if quoting else ""
    return f"{len(plain)} rows have the same tokens at the runtime ({len(texts)} texts compared){also}"


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
