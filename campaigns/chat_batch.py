"""Many prompts from a file, each answered once into a JSONL file.

- A line is on the disk before it counts. kill -9 loses what was in flight or on its way there, which is asked again.
- A request is known by the hash of what is sent (model, messages, sampling), and by how often it came before in the input: what
  the output has an answer for is not asked again; what it has an error for is, and its error line goes.
- Lines come in the order in which the answers do; `line` is the place in the input, also where that has changed since. Lines of
  prompts that are no longer in the input stay: somebody has paid for them.
- Nothing is sent before every line of the input has been understood.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import anyio
import anyio.to_thread
from pydantic import ValidationError

from agents.budget import Budget
from agents.lanes import Endpoint, Lane
from agents.policy import Policy
from agents.providers.base import Provider
from agents.scheduler import Scheduler
from agents.task import Outcome, Sampling, Task
from campaigns.rowfile import RowFile, whole_end
from campaigns.rows import Row, read_lines
from config.contracts.base import Tolerant, canonical_json, content_id
from config.contracts.sample import Message
from config.errors import ConfigError, StoreCorrupt, StoreHeld, translate_os_errors
from config.files import sync_folder, write_atomic
from config.locks import FileLock
from config.settings import Settings

ANSWER_S = 900.0  # one answer, the load of its model included
GIVE_UP_S = 120.0  # without any answer
_ROUTE = "chat"
_BEGIN = b'{"answer":"'  # of every line: keys are sorted
OnRow = Callable[[int, int], None]  # answered and failed so far, in this run


class Line(Tolerant):
    """A line of a JSONL input: a prompt or whole messages; other keys are somebody else's."""

    id: str | int = ""
    prompt: str = ""
    messages: list[Message] = []
    system: str = ""


class AnswerRow(Tolerant):
    """A line of the output. `done_reason` is stop, or length where the answer was cut at max_tokens; `error` is empty then.

    `id` is the input's, or the number of the line; `prompt` the last message; `digest` what was behind the tag `model`.
    """

    version: int = 1
    id: str
    line: int
    request: str
    model: str
    digest: str
    prompt: str
    answer: str = ""
    done_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Question:
    line: int
    id: str
    task: Task


@dataclass(frozen=True)
class BatchEnd:
    """Of this run. `cut`: those of the answered that stopped at max_tokens."""

    answered: int = 0
    cut: int = 0
    failed: int = 0


def read_questions(path: Path, model: str, system: str, sampling: Sampling) -> list[Question]:
    """The questions of a file. Raises ConfigError naming file and line of what is wrong, OSError where there is no file."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{number}: this is no UTF-8", hint="convert the file to UTF-8 first") from None
    filled = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    as_json = path.suffix in (".jsonl", ".ndjson", ".json") or (bool(filled) and _is_object(filled[0][1]))
    questions, times = [], Counter[str]()
    for number, line in filled:
        asked = _line(line, f"{path}:{number}") if as_json else Line(prompt=line)
        messages = _messages(asked, system, f"{path}:{number}")
        same = content_id([message.model_dump() for message in messages])
        task = Task(_ROUTE, "", model, tuple(messages), sampling, 1, times[same])
        times[same] += 1
        questions.append(Question(number, str(asked.id) or str(number), task))
    if not questions:
        raise ConfigError(f"{path} has no prompt in it", hint='write one a line, or JSON objects with "prompt"')
    return questions


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _line(text: str, where: str) -> Line:
    try:
        return Line.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{where}: {what + ': ' if what else ''}{first['msg']}", hint='a line is {"prompt": "…"} or {"messages": […]}'
        ) from None


def _messages(asked: Line, system: str, where: str) -> list[Message]:
    if bool(asked.prompt.strip()) == bool(asked.messages):
        raise ConfigError(f'{where}: a line needs either "prompt" or "messages"', hint="and no empty ones")
    messages = asked.messages or [Message(role="user", content=asked.prompt)]
    if messages[-1].role != "user":
        raise ConfigError(f"{where}: the last message is to be the user's", hint="the model answers it")
    if asked.system and messages[0].role == "system":
        raise ConfigError(f"{where}: there are two system messages", hint='leave "system" out, or the first of "messages"')
    first = asked.system or system
    if first and messages[0].role != "system":
        messages = [Message(role="system", content=first), *messages]
    return messages


@contextmanager
def output_held(settings: Settings, path: Path) -> Iterator[None]:
    """One process writes an output. Raises StoreHeld."""
    lock = FileLock(settings.home / "locks" / f"chat-{content_id(str(path.resolve()))[:16]}.lock")
    if not lock.acquire():
        raise StoreHeld(f"another hafs writes {path} now", hint="wait for it, or choose another file")
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Kept:
    """What an output holds already: `digests` of the models that gave its answers, and how many `foreign` lines it has.

    Those are answers to other prompts, or to these ones with other settings or of another model.
    """

    owed: list[Question]
    digests: list[str]
    foreign: int


def still_owed(path: Path, questions: Sequence[Question]) -> Kept:
    """What an output has of the answers. Its lines get the places of their prompts; those with an error leave the file.

    Raises:
        ConfigError: it cannot be an output.
        StoreCorrupt: it holds something else than answers.
    """
    asked = {question.task.id: question for question in questions}
    rows = _rows(path) if path.exists() else []
    kept = [_placed(row, asked) for row in rows if not (row.get("error") and row["request"] in asked)]
    if kept != rows:
        write_atomic(path.resolve(), b"".join(canonical_json(row) + b"\n" for row in kept))  # a link stays one
    done = {row["request"]: str(row.get("digest", "")) for row in kept if row["request"] in asked}
    owed = [question for question in questions if question.task.id not in done]
    return Kept(owed, sorted(set(done.values())), len(kept) - len(done))


def _placed(row: Row, asked: Mapping[str, Question]) -> Row:
    """The same answer where its prompt is now: lines may have been put before it, or its id may have changed."""
    question = asked.get(row["request"])
    return {**row, "id": question.id, "line": question.line} if question else row


def _rows(path: Path) -> list[Row]:
    """The lines of an output. What a crash has torn at its end is cut off, once it is clear whose the file is."""
    if not path.is_file():
        raise ConfigError(f"{path} is no file", hint="choose another file for --output: what it holds is read to continue")
    data, end = path.read_bytes(), whole_end(path)
    rows = list(islice(read_lines(path), data.count(b"\n", 0, end)))
    ours = all(isinstance(row.get("request"), str) and "answer" in row for row in rows)
    torn, _, behind = data[end:].partition(b"\0")  # a power cut keeps some pages of a write, and leaves zeros for the others
    begun = torn.startswith(_BEGIN) or (_BEGIN.startswith(torn) and bool(rows or torn or not behind.strip(b"\0")))
    if not ours or not begun:
        raise StoreCorrupt(f"{path} holds something else than answers of hafs chat", hint="choose another file for --output")
    file = RowFile(path)
    try:
        file.open()
    finally:
        file.close()
    return list(read_lines(path))


async def answer_all(
    provider: Provider, model: str, digest: str, owed: Sequence[Question], path: Path, parallel: int | None, on_row: OnRow
) -> BatchEnd:
    """Answer all of them into the output, each in a row of its own.

    Args:
        parallel: requests at once; None: as many as the server is found to bear.

    Raises:
        ProviderError: the server answers no more; what was answered is in the file.
        DiskFull, StoreError: the file cannot be written.
    """
    output = _Output(path, owed, model, digest, on_row)
    lane = Lane(_ROUTE, provider, model, Endpoint("the model server", slots=parallel), timeout_s=ANSWER_S)
    with translate_os_errors(path), output:
        if owed:
            scheduler = Scheduler([lane], {_ROUTE: [_ROUTE]}, Budget(None), Policy(give_up_s=GIVE_UP_S))
            await scheduler.run(_Source(owed), output.keep)
    return BatchEnd(output.answered, output.cut, output.failed)


class _Source:
    """The TaskSource of a list."""

    def __init__(self, owed: Sequence[Question]) -> None:
        self._owed = [question.task for question in reversed(owed)]

    def next(self, domains: Collection[str]) -> Task | None:
        return self._owed.pop() if domains and self._owed else None

    def remaining(self) -> int:
        return len(self._owed)


class _Output:
    def __init__(self, path: Path, owed: Sequence[Question], model: str, digest: str, on_row: OnRow) -> None:
        self._file, self._on_row = RowFile(path), on_row
        self._model, self._digest = model, digest
        self._questions = {question.task.id: question for question in owed}
        self._turn = anyio.Lock()
        self._waiting: list[bytes] = []
        self.answered = self.cut = self.failed = 0

    def __enter__(self) -> None:
        self._file.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.open()
        sync_folder(self._file.path.parent)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    async def keep(self, outcome: Outcome) -> None:
        row = self._row(outcome)
        line = canonical_json(row.model_dump(mode="json")) + b"\n"
        self._waiting.append(line)
        async with self._turn:
            if self._waiting:  # else whoever had the turn has written it: lines that come together share an fsync
                lines, self._waiting = self._waiting, []
                await anyio.to_thread.run_sync(self._file.append, b"".join(lines))
        self.answered += not row.error
        self.failed += bool(row.error)
        self.cut += row.done_reason == "length"
        self._on_row(self.answered, self.failed)

    def _row(self, outcome: Outcome) -> AnswerRow:
        question, answer = self._questions[outcome.task.id], outcome.completion
        row = AnswerRow(
            id=question.id,
            line=question.line,
            request=outcome.task.id,
            model=self._model,
            digest=self._digest,
            prompt=outcome.task.messages[-1].content,
            error=outcome.error,
        )
        if answer is None:
            return row
        told = {
            "prompt_tokens": answer.usage.prompt_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "latency_s": round(answer.latency_s, 3),
        }
        if answer.finish_reason in ("stop", "length"):
            return row.model_copy(update={**told, "answer": answer.text, "done_reason": answer.finish_reason})
        return row.model_copy(update={**told, "error": f"the answer is not whole: {answer.detail or answer.finish_reason}"})
