"""Held-out sets share nothing with training, whatever is asked for, and every process makes the same items."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from campaigns.domains.asm.catalogue import MODES, catalogue
from campaigns.domains.asm.domain import AsmDomain
from campaigns.domains.asm.items import UNSEEN_OPERANDS, UNSEEN_PAIRS, operands_of, reserved
from campaigns.domains.registry import domain
from config.errors import ConfigError

ASM = AsmDomain()
CELLS = ASM.cells([])
DIGEST = """
from campaigns.domains.asm.domain import AsmDomain
from config.contracts.base import content_id
asm = AsmDomain()
items = [asm.item(cell, number, []) for cell in asm.cells([]) for number in (0, 3, 11)]
items += [item for name in asm.benchmark_sets for item in asm.benchmark(name, 70)]
print(content_id([[item.id, item.cell, item.question, item.fact, item.details] for item in items if item]))
"""


def test_the_corpus_is_of_the_size_a_small_model_learns() -> None:
    assert 24 <= len(CELLS) <= 36
    assert len(set(CELLS)) == len(CELLS)


@given(
    cell=st.sampled_from(CELLS), number=st.integers(0, 300), name=st.sampled_from(ASM.benchmark_sets), place=st.integers(0, 150)
)
def test_no_training_item_shares_an_operand_with_a_benchmark(cell: str, number: int, name: str, place: int) -> None:
    trained = ASM.item(cell, number, [])
    held_out = ASM.benchmark(name, place + 1)[place]
    assert all(reserved(operand) for operand in operands_of(held_out))
    if trained is not None:
        assert not any(reserved(operand) for operand in operands_of(trained))
        assert trained.id != held_out.id and trained.question != held_out.question


def test_unseen_pairs_are_in_no_cell_while_instruction_and_mode_are() -> None:
    corpus = catalogue()
    trained = {step for forms in corpus.cells.values() for form in forms for step in corpus.forms[form].steps}
    for name in corpus.unseen_pairs:
        (step,) = corpus.forms[name].steps
        assert step not in trained
        assert step.mnemonic in {other.mnemonic for other in trained}
        assert step.mode in {other.mode for other in trained}


@pytest.mark.parametrize("name", ASM.benchmark_sets)
def test_a_benchmark_has_sixty_items_and_a_longer_one_begins_with_a_shorter(name: str) -> None:
    items = ASM.benchmark(name, 60)
    assert len({item.id for item in items}) == 60
    assert ASM.benchmark(name, 200)[:60] == items


def test_a_benchmark_ends_where_its_operands_do() -> None:
    assert len(ASM.benchmark(UNSEEN_PAIRS, 10**6)) < 10**6


def test_the_question_of_the_documentation_is_held_out() -> None:
    assert reserved("$10")
    questions = {item.question for item in ASM.benchmark(UNSEEN_OPERANDS, 5000)}
    assert "What does LDA #$10 do?" in questions
    assert "What does LDA #$10 do?" not in {item.question for n in range(300) if (item := ASM.item("LDA immediate", n, []))}


def test_the_items_of_a_cell_differ_and_end() -> None:
    for cell in CELLS:
        items = []
        while item := ASM.item(cell, len(items), []):
            items.append(item)
            assert item.cell == cell
        assert len({item.id for item in items}) == len(items) >= 4
        assert ASM.item(cell, len(items) + 1000, []) is None


def test_a_fact_reads_as_a_reference_would() -> None:
    facts = {cell: item.fact for cell in CELLS if (item := ASM.item(cell, 0, []))}
    assert facts["transfers"] == "TAX copies the accumulator to the X register. It updates the N and Z flags."
    item = ASM.item("STA absolute,X", 0, [])
    assert item is not None
    (operand,) = operands_of(item)
    assert item.question == f"What does STA {operand},X do?"
    assert item.fact == f"STA {operand},X stores the accumulator at address {operand} plus X. It changes no flags."


@pytest.mark.parametrize(
    ("mnemonics", "flags"),
    [
        ("LDA LDX LDY AND ORA EOR INC DEC INX INY DEX DEY TAX TAY TXA TYA TSX TXY TYX PLA PLX PLY", "NZ"),
        ("CMP CPX CPY ASL LSR ROL ROR", "NZC"),
        ("ADC SBC", "NVZC"),
        ("BIT", "NVZ"),
        ("STA STX STY STZ PHA PHX PHY TXS", ""),
    ],
)
def test_flags_are_those_of_the_programming_manual(mnemonics: str, flags: str) -> None:
    forms = [form for form in catalogue().forms.values() if form.steps[0].mnemonic in mnemonics.split() and len(form.steps) == 1]
    assert len(forms) >= len(mnemonics.split())
    assert {"".join(sorted(form.flags or "")) for form in forms} == {"".join(sorted(flags))}


def test_modes_are_those_the_processor_has() -> None:
    modes: dict[str, set[str]] = {}
    for form in catalogue().forms.values():
        if len(form.steps) == 1:
            modes.setdefault(form.steps[0].mnemonic, set()).add(form.steps[0].mode.name)
    assert modes["LDX"] == {"immediate", "dp", "dp,Y", "absolute", "absolute,Y"}
    assert modes["STY"] == {"dp", "dp,X", "absolute"}
    assert modes["CPX"] == {"immediate", "dp", "absolute"}
    assert modes["LDA"] == modes["ADC"] == set(MODES) - {"implied", "dp,Y"}
    assert all("immediate" not in modes[store] for store in ("STA", "STX", "STY", "STZ"))


def test_every_process_makes_the_same_items() -> None:
    def digest(seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True).stdout

    first = digest("1")
    assert len(first.strip()) == 64
    assert first == digest("2")


def test_unknown_names_are_errors_that_list_the_known() -> None:
    with pytest.raises(ConfigError) as unknown_domain:
        domain("asn")
    assert "asm" in unknown_domain.value.hint
    with pytest.raises(ConfigError) as unknown_cell:
        ASM.item("LDA sideways", 0, [])
    assert "LDA immediate" in unknown_cell.value.hint
    with pytest.raises(ConfigError) as unknown_set:
        ASM.benchmark("seen", 3)
    assert UNSEEN_PAIRS in unknown_set.value.hint


def test_the_registry_knows_asm() -> None:
    assert domain("asm").name == "asm"
