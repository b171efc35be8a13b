"""Base, base with worked examples, and tuned on the held-out sets of a domain.

A finished answer sheet is kept under a name made of all that went into it, so an evaluation that was cut off goes on with the
next sheet. One model answers all its sheets before the next one loads: servers swap a base and its adapter models in and out.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from agents.providers.base import Provider
from agents.task import Sampling
from campaigns.domains.base import Domain
from campaigns.domains.registry import domain
from campaigns.evaluation.report import BASE, TUNED, Evaluation, SetResult
from campaigns.evaluation.score import Answer, score
from campaigns.spec import EvaluateSpec
from config.contracts.base import canonical_json, content_id
from config.contracts.job import Perplexity
from config.files import write_atomic

SHEET = TypeAdapter(list[Answer])
SAMPLING = Sampling(temperature=0.0, max_tokens=64, num_ctx=1024, seed=0)
OnSheet = Callable[[str, int, bool], None]  # contender and set, questions, whether the sheet was there


async def compare(
    provider: Provider,
    *,
    base: str,
    tuned: str,
    made_by: str,
    domain_name: str,
    wanted: EvaluateSpec,
    perplexity: Perplexity | None,
    folder: Path,
    on_sheet: OnSheet,
) -> Evaluation:
    """Score all contenders on all sets of a domain.

    Args:
        made_by: the job that made `tuned`: a tag can come again, a job cannot.
        folder: where answer sheets are kept.

    Raises:
        ProviderError: a call failed; finished sheets are kept.
    """
    subject = domain(domain_name)
    contenders = {BASE: (base, 0), f"base + {wanted.examples} examples": (base, wanted.examples), TUNED: (tuned, 0)}
    if not wanted.examples:
        contenders = {BASE: (base, 0), TUNED: (tuned, 0)}
    sheets: dict[str, dict[str, Sequence[Answer]]] = {name: {} for name in subject.benchmark_sets}
    for contender, (model, examples) in contenders.items():
        for set_name in subject.benchmark_sets:
            made_of = [model, made_by if model == tuned else "", examples, set_name, wanted.questions]
            path = folder / f"{content_id([*made_of, subject.name, subject.template_version, SAMPLING.named])[:16]}.json"
            kept = _kept(path)
            on_sheet(f"{contender}, {set_name}", wanted.questions, kept is not None)
            sheets[set_name][contender] = kept or await _answered(provider, model, subject, set_name, examples, wanted, path)
    results = [SetResult(name, answers) for name, answers in sheets.items()]
    return Evaluation(base, tuned, subject.name, results, perplexity)


async def _answered(
    provider: Provider, model: str, subject: Domain, set_name: str, examples: int, wanted: EvaluateSpec, path: Path
) -> list[Answer]:
    items = subject.benchmark(set_name, wanted.questions)
    answers = await score(provider, model, subject, items, examples=examples, slots=wanted.slots, sampling=SAMPLING)
    write_atomic(path, canonical_json([asdict(answer) for answer in answers]))
    return answers


def _kept(path: Path) -> list[Answer] | None:
    """An answer sheet of an earlier run; one that cannot be read is asked again."""
    try:
        return SHEET.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
