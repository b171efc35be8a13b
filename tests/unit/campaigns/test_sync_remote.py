"""Calls over real child processes that cut, stall, babble or lie."""

import io
import json
import sys
import time
from pathlib import Path
from typing import cast

import pytest

from campaigns.sync import remote
from campaigns.sync.local import LocalTransport
from campaigns.sync.remote import Node, Question
from campaigns.sync.transport import Transport
from config.contracts.wire import MAX_LINE_BYTES, MODELS, PING, STATUS, JobArgs, Nothing, Request
from config.errors import HafsError, JobNotFound, NodeUnreachable, ProtocolError, TransferError

PONG = json.dumps({"version": 1, "result": {"hafs": "9", "protocol": 1, "root": "/n", "daemon": False, "platform": "linux"}})
JOBS = json.dumps({"version": 1, "result": {"jobs": []}, "new_field_of_a_newer_peer": 1})
LINE = Request(verb="status").model_dump_json().encode() + b"\n"


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_S", 0)


def child(*actions: str) -> LocalTransport:
    """A process that does one action for each line it reads: what it prints, or Python after `!`; then it ends."""
    program = "import sys, time\nout = sys.stdout\n"
    for action in actions:
        program += "sys.stdin.readline()\n"
        program += f"{action[1:]}\n" if action.startswith("!") else f"out.write({action!r})\nout.flush()\n"
    return LocalTransport([sys.executable, "-S", "-E", "-c", program])


def node_over(*transports: LocalTransport) -> Node:
    """A node whose connections are these, in turn."""
    waiting: list[Transport] = list(transports)
    return Node("box", lambda: waiting.pop(0))


def test_an_answer_of_a_newer_peer_is_read() -> None:
    with node_over(child(PONG + "\n", JOBS + "\r\n")) as node:
        assert node.call(STATUS, JobArgs()).jobs == []


@pytest.mark.parametrize("cut", range(0, len(JOBS) + 1))
def test_an_answer_cut_at_any_byte_is_asked_again_over_a_new_connection(cut: int) -> None:
    with node_over(child(PONG + "\n", JOBS[:cut]), child(PONG + "\n", JOBS + "\n")) as node:
        assert node.call(STATUS, JobArgs()).jobs == []


class Fellow:
    """A transport whose other side answers only once everything has been asked."""

    def __init__(self, *answers: str) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)
        self.closed = False

    def send(self, line: bytes, body: object, on_bytes: object) -> None:
        self.asked.append(json.loads(line)["verb"])

    def receive(self, deadline_s: float) -> bytes:
        assert len(self.asked) == 3, "it waits for an answer before it has asked all"
        answer = self._answers.pop(0)
        if not answer:
            raise NodeUnreachable("cut")
        return answer.encode()

    def close(self) -> None:
        self.closed = True


QUESTIONS: list[Question] = [(STATUS, JobArgs()), (MODELS, Nothing())]
NO_MODELS = json.dumps({"version": 1, "result": {"models": []}})


def node_of(*fellows: Fellow) -> Node:
    waiting = list(fellows)
    return Node("box", lambda: cast(Transport, waiting.pop(0)))


def test_several_questions_and_the_handshake_are_one_exchange() -> None:
    fellow = Fellow(PONG, JOBS, NO_MODELS)
    with node_of(fellow) as node:
        jobs, models = node.ask(QUESTIONS)
    assert (jobs.jobs, models.models, fellow.asked) == ([], [], ["ping", "status", "models"])


@pytest.mark.parametrize("lost", range(3))
def test_an_exchange_cut_at_any_answer_is_made_again(lost: int) -> None:
    answers = [PONG, JOBS, NO_MODELS]
    first = Fellow(*answers[:lost], "")
    with node_of(first, Fellow(*answers)) as node:
        assert node.ask(QUESTIONS)[1].models == []
    assert first.closed


def test_a_refusal_among_the_answers_spends_the_connection() -> None:
    refusal = json.dumps({"version": 1, "error": {"code": "JobNotFound", "message": "no job", "hint": ""}})
    fellow = Fellow(PONG, refusal, NO_MODELS)
    with node_of(fellow) as node, pytest.raises(JobNotFound):
        node.ask(QUESTIONS)
    assert fellow.closed, "the answer nobody has read would be taken for the next one"


def test_another_protocol_is_told_before_its_answers_are_read() -> None:
    fellow = Fellow(PONG.replace('"protocol": 1', '"protocol": 2'), "garbage", "garbage")
    with node_of(fellow) as node, pytest.raises(ProtocolError, match="protocol 2"):
        node.ask(QUESTIONS)


def test_an_answer_cut_twice_is_an_unreachable_node() -> None:
    with node_over(*(child(PONG + "\n", JOBS[:9]) for _ in range(2))) as node:
        with pytest.raises(NodeUnreachable):
            node.call(STATUS, JobArgs())


def test_a_silent_node_is_left_at_the_deadline() -> None:
    transport = child("!time.sleep(60)")
    begin = time.monotonic()
    with pytest.raises(NodeUnreachable, match="did not answer within 0.3 s"):
        transport.exchange(LINE, 0.3)
    transport.close()
    assert time.monotonic() - begin < 10


def test_a_node_that_reads_nothing_is_left_at_the_deadline() -> None:
    transport = LocalTransport([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    with pytest.raises(NodeUnreachable, match="did not answer"):
        transport.exchange(b"x" * 2**20 + b"\n", 0.3)
    transport.close()


def test_babble_before_the_answer_is_shown() -> None:
    with node_over(child("Welcome to box! " * 30 + "\n" + PONG + "\n")) as node:
        with pytest.raises(ProtocolError, match="no reply of hafs-node: Welcome to box!") as raised:
            node.open()
    assert len(str(raised.value)) < 300 and "start-up file" in raised.value.hint


@pytest.mark.parametrize("reply", ["{}", "[]", "null", '{"result": {"jobs": 3}}', '{"error": 3}', "\x00\x01", '{"result":'])
def test_what_is_no_reply_is_a_protocol_error(reply: str) -> None:
    with node_over(child(PONG + "\n", reply + "\n")) as node, pytest.raises(ProtocolError):
        node.call(STATUS, JobArgs())


def test_an_endless_line_is_refused_in_bounded_memory() -> None:
    transport = child(f"!out.write('x' * ({MAX_LINE_BYTES} + 9)); out.flush()")
    with pytest.raises(ProtocolError, match="without a line end"):
        transport.exchange(LINE, 30)
    transport.close()


def test_a_request_longer_than_the_wire_allows_is_not_sent() -> None:
    with node_over(child(PONG + "\n")) as node, pytest.raises(ProtocolError, match="longer than"):
        node.call(STATUS, JobArgs(job="x" * MAX_LINE_BYTES))


@pytest.mark.parametrize(
    ("protocol", "older"), [(0, "hafs nodes upgrade box"), (2, 'pip install --upgrade "hafs[laptop]" on this machine')]
)
def test_a_skew_of_versions_names_both_and_who_is_older(protocol: int, older: str) -> None:
    pong = PONG.replace('"protocol": 1', f'"protocol": {protocol}')
    with node_over(child(pong + "\n")) as node, pytest.raises(ProtocolError, match="hafs 9") as raised:
        node.open()
    assert raised.value.hint.endswith(older)


def test_what_another_version_does_not_understand_names_the_upgrade() -> None:
    error = json.dumps({"error": {"code": "ProtocolError", "message": "no verb doctor", "hint": "what was advised in its day"}})
    with node_over(child(PONG + "\n", error + "\n")) as node, pytest.raises(ProtocolError, match="no verb doctor") as raised:
        node.call(STATUS, JobArgs())
    assert raised.value.hint.endswith("hafs nodes upgrade box")


@pytest.mark.parametrize(("code", "kind"), [("JobNotFound", JobNotFound), ("FromTheFuture", HafsError)])
def test_an_error_of_the_node_is_raised_as_its_class(code: str, kind: type[HafsError]) -> None:
    error = json.dumps({"error": {"code": code, "message": "no job x", "hint": "list them"}})
    with node_over(child(PONG + "\n", error + "\n", JOBS + "\n")) as node:
        with pytest.raises(HafsError, match="box: no job x") as raised:
            node.call(STATUS, JobArgs(job="x"))
        assert type(raised.value) is kind and raised.value.hint == "list them"
        assert node.call(STATUS, JobArgs()).jobs == []  # the same connection still serves


def test_a_command_that_ends_at_once_is_told_with_what_it_said() -> None:
    transport = LocalTransport([sys.executable, "-S", "-c", "import sys; sys.exit('no module named hafs')"])
    with pytest.raises(ProtocolError, match="status 1 before it answered: no module named hafs"):
        transport.exchange(LINE, 30)
    transport.close()


def test_a_command_that_is_missing_is_told() -> None:
    with pytest.raises(NodeUnreachable, match="cannot start /nowhere/hafs-node"):
        LocalTransport(["/nowhere/hafs-node"])


def test_a_spent_connection_is_not_used_again() -> None:
    late = child(PONG + "\n", "!time.sleep(0.6); out.write('late'); out.flush()", "!")
    with node_over(late, child(PONG + "\n", JOBS + "\n")) as node:
        node.open()
        assert node.call(STATUS, JobArgs(), deadline_s=0.2).jobs == []


def test_a_download_continues_at_the_offset(tmp_path: Path) -> None:
    transport = child("!")
    source, back = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)) * 4000)
    counted: list[int] = []
    with back.open("wb") as target:
        transport.download(str(source), target, 500_000, counted.append)
    assert back.read_bytes() == source.read_bytes()[500_000:] and sum(counted) == 524_000
    with back.open("wb") as target, pytest.raises(TransferError, match="cannot read .*/gone"):
        transport.download(str(tmp_path / "gone"), target, 0, counted.append)
    transport.close()


COUNTING = """
import sys
while line := sys.stdin.buffer.readline():
    print(len(sys.stdin.buffer.read(int(line))), flush=True)
"""


def test_what_is_sent_is_answered_in_its_order() -> None:
    transport = LocalTransport([sys.executable, "-S", "-E", "-c", COUNTING])
    counted: list[int] = []
    for size in (600_000, 0, 5):
        transport.send(b"%d\n" % size, io.BytesIO(bytes(size)), counted.append)
    assert [transport.receive(30) for _ in range(3)] == [b"600000", b"0", b"5"] and sum(counted) == 600_005
    with pytest.raises(NodeUnreachable, match="within 0.2 s"):
        transport.receive(0.2)
    transport.close()


def test_the_types_of_a_call_follow_the_verb() -> None:
    pong = json.dumps({"result": {"models": []}})
    with node_over(child(PONG + "\n", PONG + "\n", pong + "\n")) as node:
        assert node.call(PING, Nothing()).root == "/n"
        assert node.call(MODELS, Nothing()).models == []
