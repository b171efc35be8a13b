import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.contracts.job import JobSpec, JobState, TrainJob
from config.contracts.wire import ReadArgs, ReadResult
from config.errors import JobNotFound
from trainer_node import logs
from trainer_node.jobdir import Exit, JobDir
from trainer_node.logs import read_lines, read_log, read_metrics
from trainer_node.queue import Queue


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path)
    yield queue
    queue.close()


@pytest.fixture
def folder(queue: Queue, tmp_path: Path) -> JobDir:
    """A job in its first attempt."""
    spec = JobSpec(kind="sft", name="coder", base="x", data=["d"])
    job = TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce="0")
    view, _ = queue.submit(job, lambda *_: None)
    queue.begin_attempt(view.id)
    folder = JobDir(tmp_path / "jobs" / view.id)
    folder.attempt(1).mkdir(parents=True)
    return folder


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def interrupt(queue: Queue, folder: JobDir) -> None:
    queue.interrupt(folder.id, checkpoint=1, why="cut off", tail="Killed", backoff_s=0)
    queue.requeue_due(1e12)
    queue.begin_attempt(folder.id)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=8), st.integers(1, 40))
def test_read_in_any_pieces_a_log_is_the_same(tmp_path_factory: pytest.TempPathFactory, writes: list[bytes], chunk: int) -> None:
    path = tmp_path_factory.mktemp("log") / "log.txt"
    path.touch()
    seen, offset = "", 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "CHUNK_BYTES", max(chunk, 4))
        for data in writes:
            append(path, data)
            text, offset = read_lines(path, offset, whole=False)
            seen += text
        while True:
            text, new = read_lines(path, offset, whole=True)
            if new == offset:
                break
            seen, offset = seen + text, new
    whole = b"".join(writes)
    assert offset == len(whole), "every byte is read, and read once"
    try:
        assert seen == whole.decode()
    except UnicodeDecodeError:
        assert "�" in seen


def test_only_whole_lines_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert read_lines(path, 0, whole=False) == ("", 0)
    append(path, "step 1\nstép".encode()[:-2])
    assert read_lines(path, 0, whole=False) == ("step 1\n", 7)
    assert read_lines(path, 7, whole=False) == ("", 7)
    append(path, "ép 2".encode())
    assert read_lines(path, 7, whole=False) == ("", 7)
    assert read_lines(path, 7, whole=True)[1] == path.stat().st_size
    append(path, b"\r 50%\r100%")
    assert read_lines(path, 7, whole=False)[0].endswith("50%\r")


def test_a_line_longer_than_a_chunk_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "CHUNK_BYTES", 8)
    path = tmp_path / "log.txt"
    append(path, "aééééééé".encode())
    text, offset = read_lines(path, 0, whole=False)
    assert (text, offset) == ("aééé", 7), "never inside a character"


def test_following_a_growing_log_is_byte_exact(queue: Queue, folder: JobDir, tmp_path: Path) -> None:
    lines = [f"step {n}: loss 0.{n} — ünder way\n" for n in range(300)]
    data = "".join(lines).encode()

    def write() -> None:
        for start in range(0, len(data), 97):
            append(folder.log_file(1), data[start : start + 97])
            time.sleep(0.001)
        folder.write_exit(1, Exit(code=0))

    writer = threading.Thread(target=write)
    writer.start()
    seen, offset, replies = "", 0, 0
    while offset < len(data):
        reply = read_log(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=offset, wait_s=5))
        assert reply.text.endswith("\n")
        seen, offset, replies = seen + reply.text, reply.offset, replies + 1
    writer.join()
    assert seen == "".join(lines)
    assert replies > 1, "it came while it grew"


def test_a_reader_waits_only_as_long_as_asked(queue: Queue, folder: JobDir, tmp_path: Path) -> None:
    append(folder.log_file(1), b"one\n")
    begin = time.monotonic()
    reply = read_log(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=4, wait_s=0.3))
    assert reply.text == "" and reply.offset == 4
    assert 0.25 < time.monotonic() - begin < 3


def test_a_new_line_ends_the_wait(queue: Queue, folder: JobDir, tmp_path: Path) -> None:
    timer = threading.Timer(0.2, append, (folder.log_file(1), b"news\n"))
    timer.start()
    begin = time.monotonic()
    assert read_log(queue, tmp_path, ReadArgs(job="coder", wait_s=30)).text == "news\n"
    assert time.monotonic() - begin < 5
    timer.join()


def test_the_end_of_the_job_ends_the_wait_and_completes_the_last_line(queue: Queue, folder: JobDir, tmp_path: Path) -> None:
    append(folder.log_file(1), b"no newline at the end")
    queue.end(folder.id, JobState.CANCELLED)
    reply = read_log(queue, tmp_path, ReadArgs(job=folder.id, wait_s=30))
    assert reply.text == "no newline at the end" and reply.job.state is JobState.CANCELLED
    again = read_log(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=reply.offset, wait_s=30))
    assert again.text == "" and again.job.state.ended


def test_a_log_goes_on_with_the_next_attempt(queue: Queue, folder: JobDir, tmp_path: Path) -> None:
    append(folder.log_file(1), b"first\ntorn")
    interrupt(queue, folder)
    folder.attempt(2).mkdir()
    append(folder.log_file(2), b"second\n")
    first = read_log(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=0, wait_s=30))
    assert (first.text, first.attempt) == ("first\ntorn", 1)
    moved = read_log(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=first.offset, wait_s=30))
    assert (moved.text, moved.attempt, moved.offset) == ("", 2, 0)
    second = read_log(queue, tmp_path, ReadArgs(job=folder.id, attempt=moved.attempt, offset=moved.offset))
    assert (second.text, second.attempt) == ("second\n", 2)
    assert read_log(queue, tmp_path, ReadArgs(job=folder.id)).text == "second\n", "0 is the newest"
    with pytest.raises(JobNotFound, match="no attempt 3"):
        read_log(queue, tmp_path, ReadArgs(job=folder.id, attempt=3))


def test_metrics_that_were_cut_back_are_read_from_the_start(queue: Queue, folder: JobDir, tmp_path: Path) -> None:
    folder.metrics_file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    reply = read_metrics(queue, tmp_path, ReadArgs(job=folder.id, attempt=1))
    assert (reply.text, reply.offset) == ('{"step": 1}\n{"step": 2}\n', 24)
    folder.metrics_file.write_bytes(b'{"step": 1}\n')
    cut = read_metrics(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=24))
    assert (cut.text, cut.offset) == ("", 0)
    folder.metrics_file.write_bytes(b'{"step": 1}\n{"step": 2, "loss": 1.25}\n')
    assert read_metrics(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=24)).offset == 0
    interrupt(queue, folder)
    moved = read_metrics(queue, tmp_path, ReadArgs(job=folder.id, attempt=1, offset=12))
    assert (moved.text, moved.offset, moved.attempt) == ("", 0, 2)
    assert read_metrics(queue, tmp_path, ReadArgs(job=folder.id, attempt=2)).text.count("\n") == 2


def test_bytes_that_are_no_text_come_as_they_are(queue: Queue, folder: JobDir, tmp_path: Path) -> None:
    data = b"fine\n" + b"\xff\xfe\x00 \x1b[31m 50%\r" + "ü\n".encode()
    append(folder.log_file(1), data)
    read = read_log(queue, tmp_path, ReadArgs(job=folder.id))
    assert read.data == data and read.offset == len(data) and "�" in read.text
    again = ReadResult.model_validate_json(read.model_dump_json())
    assert again.data == data
    append(folder.log_file(1), "plain ü\n".encode())
    more = read_log(queue, tmp_path, ReadArgs(job=folder.id, offset=read.offset))
    assert more.raw == "" and more.data == "plain ü\n".encode()
