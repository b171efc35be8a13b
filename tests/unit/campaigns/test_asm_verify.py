"""The check: paraphrases of the fact pass, whatever adds, drops or alters something does not."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from campaigns.domains.asm.catalogue import catalogue
from campaigns.domains.asm.domain import AsmDomain
from campaigns.domains.asm.items import make_item
from campaigns.domains.asm.verify import REASONS
from campaigns.domains.base import SourceItem

ASM = AsmDomain()
OPERANDS = {2: "$3A", 4: "$2C4F", 6: "$7E1234"}


def item_of(form: str, *operands: str) -> SourceItem:
    return make_item(catalogue().forms[form], operands)


def every_form() -> list[SourceItem]:
    """An item of every form of the catalogue, trained or not."""
    return [
        make_item(form, [OPERANDS[step.mode.digits[0]] for step in form.operand_steps]) for form in catalogue().forms.values()
    ]


ITEMS = every_form() + [item for cell in ASM.cells([]) for n in range(2) if (item := ASM.item(cell, n, []))]
LDX = item_of("LDX immediate", "$0A")
STA = item_of("STA dp", "$12")
LDA = item_of("LDA absolute,X", "$1F00")
ADC = item_of("ADC dp", "$12")


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_the_fact_itself_passes(item: SourceItem) -> None:
    verdict = ASM.verify(item, item.fact)
    assert verdict.accepted, verdict.reason
    json.dumps(verdict.proof)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (LDX, "The LDX instruction loads the value $0A into the X register. This updates the N and Z flags."),
        (LDX, "LDX #$0A loads the X register with the immediate value $0A and sets the Z and N flags."),
        (LDX, "It loads X with $0A, updating the negative and zero flags accordingly."),
        (LDX, " LDX #$0A sets the X index register to the value of $0A. The N and Z flags are updated. "),
        (STA, "STA $12 stores the accumulator at direct page address $12 without changing any flags."),
        (STA, "STA $12 writes the value of the accumulator to address $12. It does not affect any flags."),
        (LDA, "LDA $1F00,X loads the accumulator with the value at address $1F00 indexed by X. It affects the N and Z flags."),
        (
            ADC,
            "ADC $12 adds the value at direct page address $12 with carry to the accumulator. It sets the N, V, Z, and C flags.",
        ),
        (
            ADC,
            "ADC $12 adds the contents of address $12 and the carry flag to the accumulator. It updates the flags C, Z, N and V.",
        ),
    ],
)
def test_other_wordings_pass(item: SourceItem, text: str) -> None:
    verdict = ASM.verify(item, text)
    assert verdict.accepted, verdict.reason


@pytest.mark.parametrize(
    ("item", "text", "reason"),
    [
        (LDX, "", "length"),
        (LDX, "LDX #$0A " * 60, "length"),
        (LDX, "LDX #$0A loads the X register with the immediate value $0A.\nIt updates the N and Z flags.", "format"),
        (LDX, "- LDX #$0A loads the X register with `$0A`. It updates the N and Z flags.", "format"),
        (LDX, "LDX #$0A loads the X register with the immediate value $0A. It updates the N and Z flags.<|im_end|>", "format"),
        (LDX, "LDX #$0A loads the X register with the immediate value $0B. It updates the N and Z flags.", "operand"),
        (LDX, "LDX #$0A loads the X register with the immediate value 10. It updates the N and Z flags.", "operand"),
        (LDX, "LDX #$0A loads the X register with the immediate value $0A.", "flags"),
        (LDX, "LDX #$0A loads the X register with the immediate value $0A. It updates the N, V and Z flags.", "flags"),
        (LDX, "LDX #$0A loads the X register with the immediate value $0A. It changes no flags.", "flags"),
        (LDX, "LDX #$0A updates the N and Z flags.", "register"),
        (LDX, "LDX #$0A loads the Y register with the immediate value $0A. It updates the N and Z flags.", "register"),
        (LDX, "LDX #$0A loads the X register and the accumulator with $0A. It updates the N and Z flags.", "register"),
        (LDX, "LDX #$0A compares the X register with the immediate value $0A. It updates the N and Z flags.", "effect"),
        (LDX, "LDX #$0A loads the X register with the value at address $0A. It updates the N and Z flags.", "place"),
        (LDX, "LDX #$0A loads the X register with the immediate value $0A. It clears the N and Z flags.", "wording"),
        (LDX, "LDX #$0A loads the X register with $0A. It updates the N and Z flags. This is useful for loops.", "wording"),
        (LDX, "LDX #$0A never loads the X register with $0A. It updates the N and Z flags.", "wording"),
        (STA, "STA $12 stores the accumulator at direct page address $12. It updates the N and Z flags.", "flags"),
        (STA, "STA $12 stores the accumulator at absolute address $12. It changes no flags.", "place"),
        (STA, "STA $12 stores the immediate value $12 in the accumulator. It changes no flags.", "place"),
        (LDA, "LDA $1F00,X loads the accumulator with the value at address $1F00. It updates the N and Z flags.", "register"),
        (
            ADC,
            "ADC $12 adds the value at direct page address $12 to the accumulator. It updates the N, V, Z and C flags.",
            "wording",
        ),
    ],
)
def test_what_is_wrong_is_named(item: SourceItem, text: str, reason: str) -> None:
    verdict = ASM.verify(item, text)
    assert (verdict.accepted, verdict.reason) == (False, reason)


@given(item=st.sampled_from(ITEMS), data=st.data())
def test_a_missing_or_foreign_word_fails(item: SourceItem, data: st.DataObject) -> None:
    """Articles and words such as `immediate` may go; no word may come, and none that bears a fact may go."""
    words = item.fact.split(" ")
    place = data.draw(st.integers(0, len(words)))
    foreign = data.draw(st.sampled_from(["not", "always", "$FF", "Y", "carry", "never", "stack", "two", "V", "banana", "flags"]))
    assert not ASM.verify(item, " ".join([*words[:place], foreign, *words[place:]])).accepted
    bears = re.compile(r"flags?\.|[NVZC],?|updates|changes|loads|stores|adds|no|\$\w+\.?")
    code = len(item.id.split(" "))  # the subject may be shorter: LDA for LDA $12
    bearing = [n for n, word in enumerate(words) if n >= code and bears.fullmatch(word)]
    if not bearing or item.id in ("CLC", "SEC"):  # "clears the carry" says it all
        return
    dropped = data.draw(st.sampled_from(bearing))
    assert not ASM.verify(item, " ".join(words[:dropped] + words[dropped + 1 :])).accepted


@given(item=st.sampled_from(ITEMS), other=st.sampled_from(ITEMS))
def test_the_fact_of_another_item_fails(item: SourceItem, other: SourceItem) -> None:
    if item.id != other.id:
        assert not ASM.verify(item, other.fact).accepted
        assert not ASM.verify(item, f"{item.fact} {other.fact}").accepted


@given(item=st.sampled_from(ITEMS), text=st.text(max_size=400))
def test_any_text_gets_a_verdict_with_a_stable_reason(item: SourceItem, text: str) -> None:
    verdict = ASM.verify(item, text)
    assert not verdict.accepted and verdict.reason in REASONS


@pytest.mark.parametrize("trivial", ["{id}", "{question}", "{id} {id}", "It updates the N and Z flags.", "It changes no flags."])
def test_trivial_texts_fail(trivial: str) -> None:
    for item in ITEMS:
        assert not ASM.verify(item, trivial.format(id=item.id, question=item.question)).accepted


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_every_change_differs_and_fails(item: SourceItem) -> None:
    changes = list(ASM.changes(item, item.fact))
    assert len({change.name for change in changes}) == len(changes)
    assert len(changes) >= 2 or item.id in ("CLC", "SEC")
    for change in changes:
        assert change.text != item.fact
        assert not ASM.verify(item, change.text).accepted, change


def test_changes_break_one_fact_each() -> None:
    changed = {change.name: change.text for change in ASM.changes(LDX, LDX.fact)}
    assert changed == {
        "operand": "LDX #$0B loads the X register with the immediate value $0B. It updates the N and Z flags.",
        "register": "LDX #$0A loads the Y register with the immediate value $0A. It updates the N and Z flags.",
        "flag-added": "LDX #$0A loads the X register with the immediate value $0A. It updates the N, Z and V flags.",
        "flag-dropped": "LDX #$0A loads the X register with the immediate value $0A. It updates the N flag.",
        "effect": "LDX #$0A stores the X register with the immediate value $0A. It updates the N and Z flags.",
        "place": "LDX #$0A loads the X register with the value at address $0A. It updates the N and Z flags.",
    }
