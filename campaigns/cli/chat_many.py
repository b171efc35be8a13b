"""`hafs chat --input`: many prompts from a file, with their progress on a terminal."""

from collections.abc import Callable
from pathlib import Path

import anyio

from agents.providers.ollama import OllamaProvider
from agents.task import Sampling
from campaigns.chat import find_model
from campaigns.chat_batch import BatchEnd, Question, answer_all, output_held, read_questions, still_owed
from campaigns.cli import render
from campaigns.serving import model_server
from config.errors import ConfigError, HafsError, ProviderError
from config.settings import Settings


def file_pair(source: Path | None, target: Path | None, prompt: str | None) -> tuple[Path, Path]:
    """Input and output of many prompts. Raises ConfigError where they do not belong together."""
    if source is None or target is None or prompt is not None:
        raise ConfigError("--input and --output go together, without --prompt", hint="hafs chat --input FILE --output FILE")
    if source.resolve() == target.resolve():
        raise ConfigError("--input and --output are one file", hint="choose another file for the answers")
    return source, target


def ask_many(
    settings: Settings, node: str, model: str, system: str, files: tuple[Path, Path], parallel: int | None, sampling: Sampling
) -> None:
    """Answer a file of prompts. Raises ProviderError where some have no answer in the end."""
    source, target = files
    questions = read_questions(source, model, system, sampling)
    with output_held(settings, target):
        kept = still_owed(target, questions)
        try:
            end = _answered_all(settings, node, model, kept.owed, target, parallel) if kept.owed else BatchEnd()
        except (KeyboardInterrupt, HafsError):
            if target.exists():
                render.note(f"stopped; {target} keeps what was answered, and the same command continues")
            raise
    before = len(questions) - len(kept.owed)
    by = ", ".join(digest[:12] for digest in kept.digests)  # the same name may stand for another model by now
    told = f", {before} of them before (by the model {by})" if before else ""
    render.line(f"{target}: {before + end.answered} of {len(questions)} answered{told}")
    if kept.foreign:
        render.note(f"{kept.foreign} lines of it are no answers to these prompts, as they are asked now")
    if end.cut:
        render.note(f"{end.cut} answers were cut at {sampling.max_tokens} tokens: their done_reason is length (--max-tokens)")
    if end.failed:
        raise ProviderError(f"{end.failed} prompts have no answer: their lines say why", hint="the same command asks them again")


def _answered_all(
    settings: Settings, node: str, model: str, owed: list[Question], target: Path, parallel: int | None
) -> BatchEnd:
    with model_server(settings, node) as server, render.counted("answers", len(owed)) as told:
        return anyio.run(_answer_from, server.url, model, owed, target, parallel, told)


async def _answer_from(
    url: str, model: str, owed: list[Question], target: Path, parallel: int | None, told: Callable[[int, int], None]
) -> BatchEnd:
    provider = OllamaProvider(url)
    try:
        full, digest = await find_model(provider, url, model)
        return await answer_all(provider, full, digest, owed, target, parallel, told)
    finally:
        await provider.aclose()
