"""Ask a model the questions of a domain and let the domain's verifier judge the answers.

Every item ends in one answer, in the order of the items. A call that fails is an error of the whole, never a wrong answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio

from agents.providers.base import Provider
from agents.task import Completion, Sampling
from campaigns.domains.base import Domain, SourceItem, Verdict
from config.errors import ProviderError

CUT = "cut"  # the reason of an answer that met the output limit


@dataclass(frozen=True)
class Answer:
    """`reason` is the verifier's, empty for a right answer."""

    item_id: str
    question: str
    text: str
    correct: bool
    reason: str


async def score(
    provider: Provider,
    model: str,
    domain: Domain,
    items: Sequence[SourceItem],
    *,
    examples: int,
    slots: int,
    sampling: Sampling,
) -> list[Answer]:
    """Greedy answers (temperature 0) to the questions of `items`, judged.

    Args:
        examples: worked question and answer pairs put before each question.
        slots: calls in flight.
        sampling: options of the calls, but for the temperature.

    Raises:
        ProviderError: the first call that failed; the others are cancelled.
    """
    greedy = replace(sampling, temperature=0.0)
    answers: dict[int, Answer] = {}
    failures: list[ProviderError] = []
    limiter = anyio.CapacityLimiter(slots)

    async def ask(place: int, item: SourceItem) -> None:
        system, *question = domain.question(item)
        async with limiter:
            try:
                messages = [system, *domain.worked_examples(item, examples), *question]
                answers[place] = _judged(domain, item, await provider.generate(model, messages, greedy))
            except ProviderError as error:
                failures.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for place, item in enumerate(items):
            group.start_soon(ask, place, item)
    if failures:
        raise failures[0]
    return [answers[place] for place in range(len(items))]


def _judged(domain: Domain, item: SourceItem, completion: Completion) -> Answer:
    if completion.finish_reason not in ("stop", "length"):
        raise ProviderError(
            f'{completion.model} ended the answer to "{item.question}" with {completion.finish_reason}',
            hint="see the server's log, then evaluate again",
        )
    verdict = domain.verify(item, completion.text) if completion.finish_reason == "stop" else Verdict(False, CUT)
    return Answer(item.id, item.question, completion.text, verdict.accepted, verdict.reason)
