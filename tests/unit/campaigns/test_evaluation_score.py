"""Scoring: every item one answer, bounded concurrency, greedy, and a failed call is no wrong answer."""

from collections.abc import AsyncIterator, Sequence

import anyio
import pytest

from agents.task import Completion, FinishReason, Sampling, Usage
from campaigns.domains.asm.domain import AsmDomain
from campaigns.evaluation.score import Answer, score
from config.contracts.sample import Message
from config.errors import ProviderError, ProviderUnavailable

ASM = AsmDomain()
ITEMS = ASM.benchmark("unseen-operands", 12)
FACTS = {item.question: item.fact for item in ITEMS}


class Scripted:
    """A provider that answers each question from a table, and keeps what it was sent."""

    name = "scripted"

    def __init__(self, *, wrong: str = "", fails: str = "", finish: FinishReason = "stop") -> None:
        self.wrong, self.fails, self.finish = wrong, fails, finish
        self.sent: list[tuple[list[Message], Sampling]] = []
        self.in_flight = self.most = 0

    async def generate(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        self.sent.append((list(messages), sampling))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            for _ in range(len(self.sent) % 3 + 1):  # answers come out of order
                await anyio.lowlevel.checkpoint()
            question = messages[-1].content
            if question == self.fails:
                raise ProviderUnavailable("the server is gone")
            text = "It does something." if question == self.wrong else FACTS[question]
            return Completion(text, self.finish, Usage(), model, 0.0)
        finally:
            self.in_flight -= 1

    async def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[str]:
        yield (await self.generate(model, messages, sampling)).text

    async def models(self) -> list[str]:
        return ["m"]

    async def aclose(self) -> None:
        return None


def run(provider: Scripted, *, examples: int = 0, slots: int = 3) -> list[Answer]:
    async def scored() -> list[Answer]:
        return await score(provider, "m", ASM, ITEMS, examples=examples, slots=slots, sampling=Sampling(temperature=0.9))

    return anyio.run(scored)


def test_answers_come_in_the_order_of_the_items_with_their_verdicts() -> None:
    answers = run(Scripted(wrong=ITEMS[4].question))
    assert [answer.item_id for answer in answers] == [item.id for item in ITEMS]
    assert [answer.correct for answer in answers] == [n != 4 for n in range(len(ITEMS))]
    assert answers[4].reason and not answers[3].reason


def test_calls_are_greedy_bounded_and_hold_the_examples() -> None:
    provider = Scripted()
    run(provider, examples=3, slots=2)
    assert provider.most == 2
    assert {sampling.temperature for _, sampling in provider.sent} == {0.0}
    for messages, _ in provider.sent:
        assert [message.role for message in messages] == ["system", *["user", "assistant"] * 3, "user"]


def test_without_examples_the_question_stands_alone() -> None:
    provider = Scripted()
    run(provider)
    assert [[message.content for message in messages] for messages, _ in provider.sent] == [
        [ASM.system, item.question] for item in ITEMS
    ]


def test_a_failed_call_is_an_error() -> None:
    with pytest.raises(ProviderUnavailable, match="gone"):
        run(Scripted(fails=ITEMS[5].question))


def test_a_cut_answer_is_wrong_and_a_blocked_one_is_an_error() -> None:
    assert {(answer.correct, answer.reason) for answer in run(Scripted(finish="length"))} == {(False, "cut")}
    with pytest.raises(ProviderError, match="blocked"):
        run(Scripted(finish="blocked"))
