"""Rows to token ids. The prompt is what the server will send the model, the answer is what the model has to produce.

- Prompt and answer are tokenized apart, as they are at inference, and an answer ends with the end-of-turn token: nothing after it
  is trained. What is encoded here is compared with the runtime (`agreement`) and is trained as it is.
- A tokenizer that puts a space before every text (SentencePiece) puts none between a prompt that ends with text and its answer:
  there an answer is tokenized behind a character that no piece holds.
- A control token is one where the template put it. Typed by a person, or by a model in an earlier turn, its text is ordinary text
  (`special_text`, which the runtime uses, too).
"""

from collections.abc import Sequence
from typing import Any

from config.contracts.sample import Message
from config.errors import JobFailed
from trainer_node.dataset import Encoded, Row
from trainer_node.special_text import mark, split, unmark
from trainer_node.train.tokenizer import LEAD, Rules, plain_ids


def encode(tokenizer: Any, row: Row) -> Encoded:
    """Render a row with the base's chat template and tokenize it.

    Raises:
        JobFailed: the template refuses the messages, or does not put the answer, unchanged, and the end token after the prompt.
    """
    prompt = render_prompt(tokenizer, row.messages)
    answers = [_answer(tokenizer, row, prompt, answer) for answer in row.answers]
    lead = _lead(tokenizer.rules, prompt, answers)
    if tokenizer.rules.prefixes_space and not lead:
        answers = [answer.removeprefix(" ") for answer in answers]  # the tokenizer puts one there by itself
    before = len(token_ids(tokenizer, lead))
    return Encoded(
        row=row,
        prompt=unmark(prompt),
        answers=tuple(unmark(answer) for answer in answers),
        prompt_ids=token_ids(tokenizer, prompt),
        answer_ids=tuple(token_ids(tokenizer, lead + answer)[before:] for answer in answers),
        quotes=unmark(prompt) != prompt,
        lead=lead,
    )


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text up to where the assistant begins to write, for `token_ids`: with marks where a message quotes a control token."""
    return _rendered(tokenizer, messages, add_generation_prompt=True)


def token_ids(tokenizer: Any, rendered: str) -> list[int]:
    """Ids of a rendered text: the template has put in what begins and ends it."""
    rules = tokenizer.rules
    ids: list[int] = []
    for part, special in split(rendered, rules.texts, rules.stripping):
        if special:
            ids.append(rules.special[part])
        else:
            ids += plain_ids(tokenizer, part)
    return ids


def _answer(tokenizer: Any, row: Row, prompt: str, answer: str) -> str:
    """What the template makes of an answer, up to its end token; it may set white space or an empty thought before it."""
    whole = _rendered(tokenizer, [*row.messages, Message(role="assistant", content=answer)])
    end = tokenizer.eos_token
    text, found, _ = whole[len(prompt) :].partition(end)
    if not (whole.startswith(prompt) and found and text.rstrip().endswith(mark(answer, tokenizer.rules.texts))):
        raise JobFailed(
            f"the base's chat template does not render prompt + answer + {end}, but {unmark(whole)[-200:]!r}",
            hint="take an instruct model whose template ends a turn with its end token",
        )
    return text + end


def _lead(rules: Rules, prompt: str, answers: Sequence[str]) -> str:
    """What stands before an answer while it is tokenized, where the tokenizer would put a space that the template has not."""
    parts = split(prompt, rules.texts, rules.stripping)
    behind_text = bool(parts) and not parts[-1][1]
    spaced = all(answer.startswith(" ") for answer in answers)
    return LEAD if rules.prefixes_space and behind_text and not spaced else ""


def _rendered(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """By the template, and begun with what begins every prompt."""
    from jinja2 import TemplateError

    rules = tokenizer.rules
    marked = [{"role": message.role, "content": mark(message.content, rules.texts)} for message in messages]
    wanted = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "eos_token": rules.eos}
    try:
        text = str(tokenizer.apply_chat_template(marked, **wanted))
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise JobFailed(
            f"the base's chat template refuses a chat of {roles}: {error}",
            hint="many templates know no system message: leave `system` out of the job and of its campaign, or take another base",
        ) from error
    return text if text.startswith(rules.bos) else rules.bos + text
