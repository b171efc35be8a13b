"""Dataset of a job. A source is never on both sides of the split; every dropped row is counted under a reason.

A source's side depends on its name and the seed alone, so the pairs of a DPO job are held out by the same sources
as the samples of the SFT job before it. Rows are untrusted: a control token in a message is text (train/encode.py), in an answer
it would be learned, so the row is dropped.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from pydantic import ValidationError

from config.contracts.job import JobSpec
from config.contracts.manifest import DatasetManifest, Segment
from config.contracts.sample import Message, PreferencePair, Sample
from config.errors import JobFailed
from trainer_node.special_text import has_special

MAX_WINDOW_BYTES = 2**27  # what unpacking may hold in memory; zstd's own bound for streams


@dataclass(frozen=True)
class Row:
    """What training needs of a sample (one answer) or of a pair (chosen, rejected)."""

    source_id: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """A row as it is trained: the rendered texts and their token ids. Each answer ends with the end-of-turn token.

    `quotes`: a message holds the text of a control token, so `prompt` alone does not tell what was the template's.
    `lead`: what an answer has to stand behind so that it is tokenized as it is behind the prompt; mostly nothing.
    """

    row: Row
    prompt: str
    answers: tuple[str, ...]
    prompt_ids: list[int]
    answer_ids: tuple[list[int], ...]
    quotes: bool = False
    lead: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the row: a pair is read once with each answer."""
        return sum(len(self.prompt_ids) + len(ids) for ids in self.answer_ids)

    @property
    def longest(self) -> int:
        return len(self.prompt_ids) + max(len(ids) for ids in self.answer_ids)


@dataclass(frozen=True)
class Prepared:
    train: list[Encoded]
    held_out: list[Encoded]
    dropped: dict[str, int] = field(default_factory=dict)


def prepare(rows: Iterable[Row], spec: JobSpec, special: Sequence[str], encode: Callable[[Row], Encoded]) -> Prepared:
    """Give every row its system message, drop what cannot be trained, and split by source.

    Args:
        special: control tokens as text; a row with one in an answer is dropped.

    Raises:
        JobFailed: a row has another system message than the job or cannot be encoded, or too few rows or sources are left.
    """
    dropped: Counter[str] = Counter()
    kept: list[Encoded] = []
    seen: set[Row] = set()
    control = frozenset(special)
    for number, raw in enumerate(rows, 1):
        row = with_system(raw, spec.system, number)
        reason = "duplicate" if row in seen else _fault(row, control)
        seen.add(row)
        if not reason:
            encoded = _encoded(encode, row, number)
            if encoded.longest <= spec.train.max_length:
                kept.append(encoded)
                continue
            reason = f"longer than {spec.train.max_length} tokens"
        dropped[reason] += 1
    held_out = held_out_sources({encoded.row.source_id for encoded in kept}, spec.train.held_out, spec.train.seed)
    return Prepared(
        train=[encoded for encoded in kept if encoded.row.source_id not in held_out],
        held_out=[encoded for encoded in kept if encoded.row.source_id in held_out],
        dropped=dict(dropped),
    )


def with_system(row: Row, system: str, number: int) -> Row:
    """The row with the job's system message first; `number` (from 1) names the row in the error.

    Raises:
        JobFailed: the row brings another system message: it would be trained under a text that is not registered.
    """
    own = row.messages[0].content if row.messages and row.messages[0].role == "system" else None
    if own is None and system:
        return Row(row.source_id, (Message(role="system", content=system), *row.messages), row.answers)
    if (own or "") != system:
        raise JobFailed(
            f"row {number} of the dataset has the system message {(own or '')[:80]!r}, the job has {system[:80]!r}",
            hint="set the job's `system` to the text the campaign was made with: it is registered with the model",
        )
    return row


def held_out_sources(sources: set[str], share: float, seed: int) -> set[str]:
    """The sources kept out of training: about `share` of them, at least one, and at least one left to train on.

    Raises:
        JobFailed: fewer than two sources.
    """
    if len(sources) < 2:
        raise JobFailed(
            f"too few source facts are left to train on ({len(sources)}): two are the least, one of them is held out",
            hint="look at the reasons in the log for dropped rows, or push more accepted rows",
        )
    place = {source: _place(source, seed) for source in sources}
    order = sorted(sources, key=lambda source: (place[source], source))
    held_out = {source for source in order if place[source] < share}
    return (held_out | {order[0]}) - {order[-1]}


def read_rows(root: Path, manifest: DatasetManifest) -> Iterator[Row]:
    """Rows of a dataset in the order of its manifest, read from `<root>/segments`.

    Raises:
        JobFailed: a segment is missing or is not what its name says, or a line is no row.
    """
    for segment in manifest.segments:
        for number, line in enumerate(_lines(root / "segments" / f"{segment.sha256}.jsonl.zst", segment), 1):
            try:
                yield _row(line, manifest.kind == "pairs")
            except ValidationError as error:
                first = error.errors()[0]
                raise JobFailed(
                    f"segment {segment.sha256[:12]}, line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                    hint="the campaign was written by another version of hafs: use the same one on laptop and node",
                ) from error


def read_manifest(root: Path, dataset_id: str) -> DatasetManifest:
    """Raises JobFailed where the node does not have the dataset."""
    path = root / "datasets" / f"{dataset_id}.json"
    try:
        return DatasetManifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise JobFailed(f"{path}: no such dataset on this node", hint="push the data again: `hafs sync push`") from error


def _encoded(encode: Callable[[Row], Encoded], row: Row, number: int) -> Encoded:
    try:
        return encode(row)
    except JobFailed as error:
        raise JobFailed(f"row {number} of the dataset: {error}", hint=error.hint) from error


def _row(line: bytes, pairs: bool) -> Row:
    if pairs:
        pair = PreferencePair.model_validate_json(line)
        return Row(pair.source_id, tuple(pair.messages), (pair.chosen.strip(), pair.rejected.strip()))
    sample = Sample.model_validate_json(line)
    return Row(sample.source_id, tuple(sample.messages), (sample.completion.strip(),))


def _lines(path: Path, segment: Segment) -> Iterator[bytes]:
    """The lines of a segment. What it holds is checked against its name first, what it unpacks to against the manifest."""
    left, rows = segment.bytes, 0
    try:
        with path.open("rb") as packed:
            if hashlib.file_digest(packed, "sha256").hexdigest() != segment.sha256:
                raise JobFailed(f"{path}: the content is not what the name says", hint="delete the file and push the data again")
            packed.seek(0)
            with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(packed) as reader:
                lines = io.BufferedReader(reader)
                while line := lines.readline(left + 1):
                    left, rows = left - len(line), rows + 1
                    if left < 0:
                        break
                    yield line
    except (OSError, zstandard.ZstdError) as error:
        raise JobFailed(f"{path}: cannot be read: {error}", hint="push the data again: `hafs sync push`") from error
    if left or rows != segment.rows:
        what = f"{path} does not hold the {segment.rows} rows of {segment.bytes} bytes that its dataset announces"
        raise JobFailed(what, hint="seal the data anew: remove the folder `segments` on the laptop, and push again")


def _fault(row: Row, control: frozenset[str]) -> str:
    """Why a row cannot be trained; empty if it can."""
    if not row.messages or row.messages[-1].role != "user":
        return "last message is not the user's"
    if any(message.role == "system" for message in row.messages[1:]):
        return "system message in the middle"
    if not all(row.answers):
        return "empty answer"
    if len(row.answers) != len(set(row.answers)):
        return "chosen and rejected are the same"
    if any(has_special(answer, control) for answer in row.answers):
        return "control token in the answer"
    return ""


def _place(source: str, seed: int) -> float:
    """A number in [0, 1) that is the same for this source and seed on every machine."""
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
