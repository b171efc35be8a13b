"""Rows to token ids. The prompt is what the server will send the model, the answer is what the model has to produce.

Prompt and answer are tokenized apart, as they are at inference, and an answer ends with the end-of-turn token: nothing
after it is trained. What is encoded here is compared with the runtime (`agreement`) and is trained as it is.
"""

from collections.abc import Sequence
from typing import Any

from config.contracts.sample import Message
from config.errors import JobFailed
from trainer_node.dataset import Encoded, Row


def encode(tokenizer: Any, row: Row) -> Encoded:
    """Render a row with the base's chat template and tokenize it.

    Raises:
        JobFailed: the template does not put the answer, unchanged, and the end token after the prompt.
    """
    prompt = render_prompt(tokenizer, row.messages)
    answers = tuple(answer + tokenizer.eos_token for answer in row.answers)
    for answer in row.answers:
        chat = [*_plain(row.messages), {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        if not whole.startswith(prompt + answer + tokenizer.eos_token):
            raise JobFailed(
                f"the base's chat template does not render prompt + answer + {tokenizer.eos_token}, but {whole[-200:]!r}",
                hint="take an instruct model whose template ends a turn with its end token",
            )
    return Encoded(row, prompt, answers, token_ids(tokenizer, prompt), tuple(token_ids(tokenizer, answer) for answer in answers))


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text up to where the assistant begins to write."""
    return str(tokenizer.apply_chat_template(_plain(messages), tokenize=False, add_generation_prompt=True))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered text: the template has put in what begins and ends it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message.model_dump() for message in messages]
