"""Prompts: a prefix that a server's cache can keep, examples that give nothing away."""

import pytest

from campaigns.domains.asm.domain import AsmDomain
from campaigns.domains.asm.items import form_of, operands_of, reserved
from campaigns.domains.asm.prompts import examples
from campaigns.domains.base import SourceItem

ASM = AsmDomain()


def all_items() -> list[SourceItem]:
    trained = [item for cell in ASM.cells([]) for number in range(8) if (item := ASM.item(cell, number, []))]
    return trained + [item for name in ASM.benchmark_sets for item in ASM.benchmark(name, 60)]


def test_a_prompt_is_system_three_examples_and_the_fact() -> None:
    for item in all_items():
        messages = ASM.prompt(item)
        assert [message.role for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
        assert item.fact in messages[-1].content
        assert "one or two sentences" in messages[-1].content


def test_no_example_is_of_the_instruction_asked_for_or_of_a_benchmark() -> None:
    for item in all_items():
        own = {step.mnemonic for step in form_of(item).steps}
        for example in examples(item, 3):
            assert not own & {step.mnemonic for step in form_of(example).steps}
            assert not any(reserved(operand) for operand in operands_of(example))
            assert ASM.verify(example, example.fact).accepted


def test_items_of_a_cell_share_all_but_the_last_message() -> None:
    for cell in ASM.cells([]):
        pool = [item for number in range(4) if (item := ASM.item(cell, number, []))]
        by_instruction: dict[str, list[str]] = {}
        for item in pool:
            prefix = "".join(message.content for message in ASM.prompt(item)[:-1])
            by_instruction.setdefault(form_of(item).name, []).append(prefix)
        assert all(len(set(prefixes)) == 1 for prefixes in by_instruction.values())


def test_a_mode_has_few_prefixes() -> None:
    immediate = [item for cell in ASM.cells([]) if cell.endswith("immediate") and (item := ASM.item(cell, 0, []))]
    prefixes = {ASM.prompt(item)[1].content for item in immediate}
    assert len(prefixes) <= 2 < len(immediate)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_worked_examples_are_questions_without_facts(count: int) -> None:
    item = ASM.benchmark("unseen-operands", 1)[0]
    messages = ASM.worked_examples(item, count)
    assert [message.role for message in messages] == ["user", "assistant"] * count
    assert all("Fact" not in message.content for message in messages)


def test_the_student_is_asked_without_the_fact() -> None:
    item = ASM.benchmark("unseen-operands", 1)[0]
    system, question = ASM.question(item)
    assert system.content == ASM.system
    assert question.content == item.question == f"What does {item.id} do?"
