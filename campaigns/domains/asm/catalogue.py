"""The instructions, addressing modes and routines the domain knows, read from corpus.toml.

A `Form` is what can be explained: one instruction in one mode, or a routine of a few. It has exact facts; nothing here is random.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import Field

from config.contracts.base import Strict
from config.toml import load_toml

CORPUS = Path(__file__).parent / "corpus.toml"
STEP_JOINT = " then "
REGISTER_NAMES = {"A": "the accumulator", "X": "the X register", "Y": "the Y register", "S": "the stack pointer"}


@dataclass(frozen=True)
class Mode:
    """An addressing mode. `syntax` holds {operand}, which has one of `digits` hex digits; `place` is how it is spoken of.

    `kind` is the word an address of this mode may be given. The facts leave it out for an absolute one, which is what an address
    without a word is: a small model then errs towards what is true of every mode.
    """

    name: str
    syntax: str = ""
    digits: tuple[int, ...] = ()
    place: str = ""
    kind: str = ""


MODES = {
    mode.name: mode
    for mode in (
        Mode("implied"),
        Mode("immediate", "#{operand}", (2, 4)),
        Mode("dp", "{operand}", (2,), "direct page address {operand}", "direct page"),
        Mode("dp,X", "{operand},X", (2,), "direct page address {operand} plus X", "direct page"),
        Mode("dp,Y", "{operand},Y", (2,), "direct page address {operand} plus Y", "direct page"),
        Mode("absolute", "{operand}", (4,), "address {operand}", "absolute"),
        Mode("absolute,X", "{operand},X", (4,), "address {operand} plus X", "absolute"),
        Mode("absolute,Y", "{operand},Y", (4,), "address {operand} plus Y", "absolute"),
        Mode("long", "{operand}", (6,), "long address {operand}", "long"),
        Mode("long,X", "{operand},X", (6,), "long address {operand} plus X", "long"),
    )
}


@dataclass(frozen=True)
class Step:
    mnemonic: str
    mode: Mode

    @property
    def name(self) -> str:
        return f"{self.mnemonic} {self.mode.name}"

    def code(self, operand: str) -> str:
        return f"{self.mnemonic} {self.mode.syntax.format(operand=operand)}".rstrip()


@dataclass(frozen=True)
class Form:
    """`wordings[0]` is the fact as plain text, the others are regular expressions; both hold slots such as {value}.

    `register` and `target` are register letters or empty. `flags` is "" where none changes, None where the clause says it.
    """

    name: str
    steps: tuple[Step, ...]
    wordings: tuple[str, ...]
    flags: str | None
    register: str = ""
    target: str = ""

    @property
    def operand_steps(self) -> list[Step]:
        return [step for step in self.steps if step.mode.digits]

    def code(self, operands: list[str]) -> str:
        """Source text: `LDA #$3F then STA $2100`. `operands` are those of the steps that have one."""
        left = iter(operands)
        return STEP_JOINT.join(step.code(next(left) if step.mode.digits else "") for step in self.steps)


@dataclass(frozen=True)
class Catalogue:
    """`forms` by name. `cells` maps a training cell to its forms, in order; `unseen_pairs` are forms in no training cell;
    `examples` are the mnemonics worked examples are made of, the plainest first."""

    forms: dict[str, Form]
    cells: dict[str, tuple[str, ...]]
    unseen_pairs: tuple[str, ...]
    examples: tuple[str, ...]


class _Effect(Strict):
    fact: str
    also: list[str] = []
    flags: str | None = None


class _Instruction(Strict):
    effect: str
    register_: str = Field("", alias="register")
    target: str = ""
    modes: list[str]


class _Routine(_Effect):
    lines: list[str]


class _Corpus(Strict):
    training: list[str]
    groups: dict[str, list[str]]
    routines: list[str]
    unseen_pairs: list[str]
    examples: list[str]


class _File(Strict):
    effects: dict[str, _Effect]
    instructions: dict[str, _Instruction]
    routines: dict[str, _Routine]
    corpus: _Corpus


@cache
def catalogue() -> Catalogue:
    """The catalogue that ships with the domain, read once."""
    file = load_toml(CORPUS, _File)
    forms = {form.name: form for form in [*_single_forms(file), *_routine_forms(file)]}
    cells: dict[str, tuple[str, ...]] = {name: (name,) for name in file.corpus.training}
    cells |= {group: tuple(f"{mnemonic} implied" for mnemonic in names) for group, names in file.corpus.groups.items()}
    cells |= {name: (name,) for name in file.corpus.routines}
    return Catalogue(forms, cells, tuple(file.corpus.unseen_pairs), tuple(file.corpus.examples))


def _single_forms(file: _File) -> list[Form]:
    forms = []
    for mnemonic, instruction in file.instructions.items():
        effect = file.effects[instruction.effect]
        for mode in instruction.modes:
            step = Step(mnemonic, MODES[mode])
            wordings = (effect.fact, *effect.also)
            forms.append(Form(step.name, (step,), wordings, effect.flags, instruction.register_, instruction.target))
    return forms


def _routine_forms(file: _File) -> list[Form]:
    forms = []
    for name, routine in file.routines.items():
        lines = (line.rsplit(" ", 1) for line in routine.lines)
        steps = tuple(Step(mnemonic, MODES[mode]) for mnemonic, mode in lines)
        forms.append(Form(name, steps, (routine.fact, *routine.also), routine.flags))
    return forms
