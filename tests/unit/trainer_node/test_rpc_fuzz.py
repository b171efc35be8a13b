"""What a hostile peer may send: each line is refused or harmless, the refusal is logged, and nothing else is written.

10,000 requests; HAFS_FUZZ=100000 for more, HAFS_FUZZ_SEED for others.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from config.contracts import wire
from config.locks import FileLock
from tests.fakes.evil_requests import evil_lines
from trainer_node import refusals
from trainer_node.daemon import lock_file
from trainer_node.queue import Queue
from trainer_node.refusals import note_refusal
from trainer_node.rpc import serve
from trainer_node.runtime import launch

COUNT = int(os.environ.get("HAFS_FUZZ", "10000"))
SEED = int(os.environ.get("HAFS_FUZZ_SEED", "5"))
BATCH = 500
REFUSALS = {"ProtocolError", "JobNotFound", "TransferError", "ConfigError", "StoreError"}
LOGGED = r"""\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ rpc\[\d+\] local [A-Za-z]+ ('.*'|".*")"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A node with a neighbour that nobody may touch; no daemon is started, since the test holds its lock."""
    root = tmp_path / "outer" / "node"
    (tmp_path / "outer" / "secret").mkdir(parents=True)
    (tmp_path / "outer" / "secret" / "file").write_text("mine")
    lock = FileLock(lock_file(root))
    assert lock.acquire()
    lock.sign()
    with closing(Queue(root)):
        pass
    yield root
    lock.release()


def files(folder: Path) -> dict[str, bytes]:
    """Every file below but locks, the log of refusals and the database, which is looked into."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): path.read_bytes() for path in paths if not path.name.startswith(("rpc.log", "state.sqlite"))}


@pytest.mark.timeout(900)
def test_what_must_be_refused_is_refused_logged_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ensure_runtime", lambda root: pytest.fail("it started a model server"))
    before, refused = files(tmp_path), 0
    requests = evil_lines(SEED, COUNT)
    while batch := list(islice(requests, BATCH)):
        replies = io.BytesIO()
        serve(root, io.BytesIO(b"".join(line + b"\n" for line, _ in batch)), replies)
        answers = [wire.Reply.model_validate_json(line) for line in replies.getvalue().splitlines()]
        assert len(answers) == len(batch), "one reply a line"
        for (line, must), reply in zip(batch, answers, strict=True):
            assert reply.error is not None or not must, line[:300]
            assert reply.error is None or reply.error.code in REFUSALS, (reply.error, line[:300])
            refused += reply.error is not None
    assert files(tmp_path) == before
    with closing(Queue(root)) as queue:
        assert queue.all() == []
    assert refused > COUNT * 0.8
    logged = (root / "rpc.log").read_text().splitlines()
    assert logged and all(re.fullmatch(LOGGED, line) for line in logged)
    assert sum(path.stat().st_size for path in root.glob("rpc.log*")) < 2 * refusals.MAX_BYTES + 10_000


def test_oversized_lines_are_refused_without_being_held(root: Path) -> None:
    line = b'{"verb": "status", "args": {"job": "' + b"x" * wire.MAX_LINE_BYTES + b'"}}\n'
    replies = io.BytesIO()
    serve(root, io.BytesIO(line * 2 + b'{"verb": "ping"}\n'), replies)
    codes = [json.loads(reply)["error"] for reply in replies.getvalue().splitlines()]
    assert [code and code["code"] for code in codes] == ["ProtocolError", "ProtocolError", None]


def test_a_refusal_cannot_fake_a_line_or_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "MAX_BYTES", 2000)
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.1 22")
    for number in range(100):
        note_refusal(tmp_path, "ProtocolError", f"{number}\n2026-01-01T00:00:00Z rpc[1] 10.0.0.1 Ok\x1b[31mé" + "x" * 5000)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["rpc.log", "rpc.log.1"]
    for line in files[0].read_text(encoding="ascii").splitlines():
        assert " 10.0.0.9 ProtocolError '" in line and len(line) < 500 and "\x1b" not in line


def test_a_log_that_cannot_be_written_changes_no_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    note_refusal(tmp_path / "file" / "node", "ProtocolError", "x")
