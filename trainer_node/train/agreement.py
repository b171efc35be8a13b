"""Training and serving split the same text into the same tokens, or nothing is trained."""

from collections.abc import Sequence

from config.errors import JobFailed
from trainer_node.dataset import Encoded
from trainer_node.ollama import OllamaApi

COUNTED_ROWS = 16  # a server that cannot tokenize is asked for the length of this many prompts


def require_agreement(api: OllamaApi, model: str, rows: Sequence[Encoded]) -> str:
    """Compare the ids of all rows with those of `model` at the runtime; tells what was compared.

    A server without a route to tokenize is sent some of the prompts and asked how long they were.

    Raises:
        JobFailed: naming the first row that differs, with both id lists or both lengths.
    """
    asked: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        for text, ids in zip((row.prompt, *row.answers), (row.prompt_ids, *row.answer_ids), strict=True):
            if text in asked:
                continue
            served = api.tokenize(model, text)
            if served is None:
                return _compare_lengths(api, model, rows[:COUNTED_ROWS])
            if served != ids:
                raise _disagreement(number, text, f"trained as {ids}, served as {served}")
            asked[text] = ids
    return f"{len(rows)} rows have the same tokens at the runtime ({len(asked)} texts compared)"


def _compare_lengths(api: OllamaApi, model: str, rows: Sequence[Encoded]) -> str:
    for number, row in enumerate(rows, 1):
        messages = [message.model_dump() for message in row.row.messages]
        reply = api.chat(model, messages, options={"num_predict": 1, "temperature": 0, "num_ctx": len(row.prompt_ids) + 64})
        served = int(reply.get("prompt_eval_count", 0))
        if served != len(row.prompt_ids):
            raise _disagreement(number, row.prompt, f"trained with {len(row.prompt_ids)} tokens, served with {served}")
    return f"{len(rows)} prompts have the same length at the runtime (this server has no route to compare tokens)"


def _disagreement(number: int, text: str, difference: str) -> JobFailed:
    return JobFailed(
        f"row {number} would be trained on other tokens than are served: {difference}; the text is {text[:300]!r}",
        hint="the base's tokenizer or template is not reproduced by this server: use another base or another server version",
    )
