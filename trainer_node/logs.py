"""Reading files that grow. An offset counts bytes of the file, so a reader that comes back misses nothing and sees nothing twice.

A reply carries the attempt and the offset of the next question. A log goes on with the next attempt where one ended (offset 0);
metrics.jsonl is one file a job, which a new attempt cuts back to its checkpoint: then the reader is sent back to offset 0.
"""

import base64
import codecs
from collections.abc import Callable
from pathlib import Path

from config.contracts.job import JobView
from config.contracts.wire import ReadArgs, ReadResult
from config.errors import JobNotFound
from trainer_node.jobdir import JobDir
from trainer_node.news import await_news
from trainer_node.queue import Queue

CHUNK_BYTES = 2**18


def read_log(queue: Queue, root: Path, args: ReadArgs) -> ReadResult:
    """The next whole lines of an attempt's log; waits for them up to `args.wait_s`, or until the attempt or the job ends.

    Raises:
        JobNotFound: no such job or attempt.
    """
    return _await_news(queue, args, lambda job: _log_now(job, JobDir(root / "jobs" / job.id), args))


def read_metrics(queue: Queue, root: Path, args: ReadArgs) -> ReadResult:
    """The next whole lines of the job's metrics. Of two lines with the same step the later one holds. Raises JobNotFound."""
    return _await_news(queue, args, lambda job: _metrics_now(job, JobDir(root / "jobs" / job.id), args))


def _await_news(queue: Queue, args: ReadArgs, look: Callable[[JobView], ReadResult]) -> ReadResult:
    id_ = queue.resolve(args.job).id

    def is_news(seen: ReadResult) -> bool:
        moved = seen.offset != args.offset or 0 < args.attempt < seen.attempt
        return bool(seen.text) or moved or seen.job.state.ended

    # The state is read before the file: if it says that the job has ended, then the file is whole.
    return await_news(lambda: look(queue.get(id_)), is_news, args.wait_s)


def _log_now(job: JobView, folder: JobDir, args: ReadArgs) -> ReadResult:
    attempt = _attempt(job, args)
    ended = job.state.ended or attempt < job.attempt or folder.exit(attempt) is not None
    data = _read_chunk(folder.log_file(attempt), args.offset, whole=ended)
    if not data and attempt < job.attempt:
        return ReadResult(text="", offset=0, attempt=attempt + 1, job=job)
    text = data.decode(errors="replace")
    raw = "" if text.encode() == data else base64.b64encode(data).decode()
    return ReadResult(text=text, offset=args.offset + len(data), attempt=attempt, job=job, raw=raw)


def _metrics_now(job: JobView, folder: JobDir, args: ReadArgs) -> ReadResult:
    if _attempt(job, args) < job.attempt or _was_cut(folder.metrics_file, args.offset):
        return ReadResult(text="", offset=0, attempt=job.attempt, job=job)
    text, offset = read_lines(folder.metrics_file, args.offset, whole=False)
    return ReadResult(text=text, offset=offset, attempt=job.attempt, job=job)


def read_lines(path: Path, offset: int, *, whole: bool) -> tuple[str, int]:
    """Text from `offset` to the end of the last line there, and the offset behind it. `whole`: the file grows no more.

    A carriage return ends a line too (progress bars). A line longer than a chunk comes in pieces, never inside a character.
    """
    data = _read_chunk(path, offset, whole=whole)
    return data.decode(errors="replace"), offset + len(data)


def _read_chunk(path: Path, offset: int, *, whole: bool) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(CHUNK_BYTES)
    except FileNotFoundError:
        return b""
    at_end = whole and len(data) < CHUNK_BYTES
    if not at_end:
        cut = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        data = data[:cut] if cut or len(data) < CHUNK_BYTES else data
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data, final=at_end)
    return data[: len(data) - len(decoder.getstate()[0])]


def _attempt(job: JobView, args: ReadArgs) -> int:
    if args.attempt > job.attempt:
        raise JobNotFound(f"job {job.id} has no attempt {args.attempt}", hint=f"its newest is {job.attempt}")
    return args.attempt or job.attempt


def _was_cut(path: Path, offset: int) -> bool:
    """Whether `offset` no longer stands at the start of a line of the file."""
    if offset == 0:
        return False
    try:
        with path.open("rb") as file:
            file.seek(offset - 1)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return True
