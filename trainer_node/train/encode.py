"""Rows to token ids. The prompt is what the server will send the model, the answer is what the model has to produce.

- Prompt and answer are tokenized apart, as they are at inference, and an answer ends with the end-of-turn token: nothing after it
  is trained. What is encoded here is compared with the runtime (`agreement`) and is trained as it is.
- A control token is one where the template put it. Typed by a person, or by a model in an earlier turn, its text is ordinary text
  (`special_text`, which the runtime uses, too).
"""

from collections.abc import Sequence
from typing import Any

from config.contracts.sample import Message
from config.errors import JobFailed
from trainer_node.dataset import Encoded, Row
from trainer_node.special_text import mark, split, unmark


def encode(tokenizer: Any, row: Row) -> Encoded:
    """Render a row with the base's chat template and tokenize it.

    Raises:
        JobFailed: the template does not put the answer, unchanged, and the end token after the prompt.
    """
    prompt = render_prompt(tokenizer, row.messages)
    answers = tuple(_answer(tokenizer, row, answer) for answer in row.answers)
    return Encoded(
        row=row,
        prompt=unmark(prompt),
        answers=tuple(unmark(answer) for answer in answers),
        prompt_ids=token_ids(tokenizer, prompt),
        answer_ids=tuple(token_ids(tokenizer, answer) for answer in answers),
        quotes=unmark(prompt) != prompt,
    )


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text up to where the assistant begins to write, for `token_ids`: with marks where a message quotes a control token."""
    prompt = _rendered(tokenizer, messages, add_generation_prompt=True)
    bos = tokenizer.rules.bos
    return prompt if prompt.startswith(bos) else bos + prompt


def token_ids(tokenizer: Any, rendered: str) -> list[int]:
    """Ids of a rendered text: the template has put in what begins and ends it."""
    rules = tokenizer.rules
    ids: list[int] = []
    for part, special in split(rendered, rules.special, rules.stripping):
        if special:
            ids.append(rules.special[part])
        else:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _answer(tokenizer: Any, row: Row, answer: str) -> str:
    """What the template makes of an answer, up to its end token; it may set white space or an empty thought before it."""
    prompt = _rendered(tokenizer, row.messages, add_generation_prompt=True)
    whole = _rendered(tokenizer, [*row.messages, Message(role="assistant", content=answer)])
    end = tokenizer.eos_token
    text, found, _ = whole[len(prompt) :].partition(end)
    if not (whole.startswith(prompt) and found and text.rstrip().endswith(mark(answer, tokenizer.rules.special))):
        raise JobFailed(
            f"the base's chat template does not render prompt + answer + {end}, but {unmark(whole)[-200:]!r}",
            hint="take an instruct model whose template ends a turn with its end token",
        )
    if tokenizer.rules.prefixes_space:
        text = text.removeprefix(" ")  # the tokenizer puts one there by itself
    return text + end


def _rendered(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    specials = tokenizer.rules.special
    marked = [{"role": message.role, "content": mark(message.content, specials)} for message in messages]
    return str(tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=add_generation_prompt))
