"""What the teacher and the student are sent.

Items of one mode share their system message and, but for the examples of the item's own instruction, their worked examples, so a
server's prompt cache holds. An example is never of the item's instruction and never of a benchmark.
"""

from functools import lru_cache

from campaigns.domains.asm.catalogue import Form, catalogue
from campaigns.domains.asm.items import corpus_item, form_of
from campaigns.domains.base import SourceItem
from config.contracts.sample import Message

SYSTEM = "You explain 65816 assembly code."
TEACHER_SYSTEM = "You explain 65816 assembly code. You use only the given fact and add nothing to it."
INSTRUCTION = "Explain in one or two sentences what {code} does."
WORKED_EXAMPLES = 3
EXAMPLE_NUMBER = 7  # which item of a cell stands as its example


def teacher_prompt(item: SourceItem) -> list[Message]:
    """System message, three worked examples, the fact and the instruction."""
    messages = [Message(role="system", content=TEACHER_SYSTEM)]
    for example in examples(item, WORKED_EXAMPLES):
        messages += [Message(role="user", content=_request(example)), Message(role="assistant", content=example.fact)]
    return [*messages, Message(role="user", content=_request(item))]


def student_question(item: SourceItem) -> list[Message]:
    return [Message(role="system", content=SYSTEM), Message(role="user", content=item.question)]


def question_examples(item: SourceItem, count: int) -> list[Message]:
    """Question and answer pairs of other instructions, without the system message."""
    return [
        message
        for example in examples(item, count)
        for message in (Message(role="user", content=example.question), Message(role="assistant", content=example.fact))
    ]


def examples(item: SourceItem, count: int) -> list[SourceItem]:
    """Items of other instructions: of the same shape first, then any."""
    form = form_of(item)
    taken: list[SourceItem] = []
    for example in _pool(_shape(form)):
        if len(taken) == count:
            break
        if not _mnemonics(form_of(example)) & _mnemonics(form):
            taken.append(example)
    return taken


def _request(item: SourceItem) -> str:
    return f"{INSTRUCTION.format(code=item.id)}\nFact: {item.fact}"


def _shape(form: Form) -> str:
    return "routine" if len(form.steps) > 1 else form.steps[0].mode.name


def _mnemonics(form: Form) -> set[str]:
    return {step.mnemonic for step in form.steps}


@lru_cache
def _pool(shape: str) -> tuple[SourceItem, ...]:
    """Trained items of the instructions that serve as examples, and routines: those of the shape first."""
    order = {mnemonic: place for place, mnemonic in enumerate(catalogue().examples)}
    items = [item for cell in catalogue().cells if (item := corpus_item(cell, EXAMPLE_NUMBER))]
    forms = [(form_of(item), item) for item in items]
    fit = [(form, item) for form, item in forms if form.steps[0].mnemonic in order or len(form.steps) > 1]
    fit.sort(key=lambda pair: (_shape(pair[0]) != shape, order.get(pair[0].steps[0].mnemonic, len(order))))
    return tuple(item for _, item in fit)
