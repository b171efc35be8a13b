"""What is typed in a chat, what a conversation sends, and the files that it writes."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agents.task import Sampling, Task
from campaigns import feedback
from campaigns.chat import Answer, Conversation, Exchange
from campaigns.chat_batch import Question, output_held, read_questions, still_owed
from campaigns.chat_commands import COMMANDS, changed, parse, rating
from campaigns.cli import chat_live
from campaigns.cli.chat_live import _Session
from campaigns.rows import read_rows
from campaigns.serving import Server
from campaigns.sync.remote import Node
from config.contracts.feedback import Feedback, answer_id
from config.contracts.sample import Message
from config.errors import ConfigError, StoreCorrupt, StoreHeld
from config.settings import Settings

HELLO = [Message(role="user", content="hello")]


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("/help", ("help", "")),
        ("  /SET  temperature 0.2 ", ("set", "temperature 0.2")),
        ("/system two\nlines", ("system", "two\nlines")),
        ("/bye", ("quit", "")),
        ("/?", ("help", "")),
        ("/usr/bin/env is what?", None),
        ("/ what", None),
        ("// a comment", None),
        ("what is /help", None),
    ],
)
def test_a_command_is_told_from_a_question(typed: str, command: tuple[str, str] | None) -> None:
    assert parse(typed) == command


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("/sytem x", "there is no command /sytem", "did you mean /system?"),
        ("/zzzzzz", "there is no command /zzzzzz", "/help"),
        ("/save", "/save takes FILE", "write the conversation"),
        ("/undo twice", "/undo takes nothing else", "take back"),
    ],
)
def test_a_mistyped_command_is_no_question(typed: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(typed)
    assert hint in caught.value.hint


def test_settings_are_changed_within_their_limits() -> None:
    sampling = Sampling()
    for text in ("temperature\t0.2", "top_p = 0.9", "top_k 40", "max_tokens 7", "num_ctx 8192", "seed 3"):
        sampling = changed(sampling, text)
    assert sampling == Sampling(temperature=0.2, top_p=0.9, max_tokens=7, num_ctx=8192, seed=3, top_k=40)
    assert changed(changed(sampling, "seed off"), "top_k off").named == Sampling(0.2, 0.9, 7, 8192).named
    for text, hint in [
        ("temprature 1", "temperature"),
        ("temperature hot", "from 0 to 2"),
        ("temperature nan", "from 0 to 2"),
        ("temperature off", "from 0 to 2"),
        ("num_ctx 1", "from 256 on"),
        ("seed 1.5", "whole number from 0 on, or off"),
        ("max_tokens", "from 1 on"),
    ]:
        with pytest.raises(ConfigError) as caught:
            changed(sampling, text)
        assert hint in caught.value.hint


def test_ratings_are_read() -> None:
    assert rating("up") == ("up", "")
    assert rating("down\nwrong register") == ("down", "wrong register")
    assert rating("down  wrong register ") == ("down", "wrong register")
    with pytest.raises(ConfigError, match="up or down"):
        rating("good")


def test_every_command_of_the_list_is_carried_out() -> None:
    source = Path(str(_Session.__init__.__code__.co_filename)).read_text()
    assert all(f'"{word}"' in source for word in COMMANDS)


def test_no_ctrl_c_ends_a_session_however_many_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Nervous(Node):
        """Ctrl-C comes while it is asked, and again while what that left is mended."""

        closed = 0

        def call(self, *_: Any) -> Any:
            raise KeyboardInterrupt

        def close(self) -> None:
            self.closed += 1
            if self.closed == 1:
                raise KeyboardInterrupt

    node = Nervous("box", lambda: pytest.fail("nothing is dialled"))
    server = Server("http://127.0.0.1:1", "", False, True)
    session = _Session(Settings(home=tmp_path), node, server, "m", Conversation(), Sampling())
    typed = iter(["/info", "/set seed 7", "/quit"])
    session._person, session._read = True, lambda: next(typed)
    try:
        session.run()
    except KeyboardInterrupt:
        pytest.fail("the second Ctrl-C ended the session")
    assert node.closed == 2 and next(typed, "") == ""
    told = capsys.readouterr().err
    assert told.count("stopped") == 1 and "seed 7" in told


def test_a_second_ctrl_c_takes_away_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def closing(*_: Any, **__: Any) -> Iterator[Server]:
        yield Server("http://127.0.0.1:1", "", False, True)
        raise KeyboardInterrupt

    partial = Answer("as far as it ca", "stopped", "m")
    monkeypatch.setattr(chat_live, "server_of", closing)
    monkeypatch.setattr(chat_live, "ask", lambda *_: partial)
    node = Node("box", lambda: pytest.fail("nothing is dialled"))
    session = _Session(Settings(home=tmp_path), node, Server("", "", False, True), "m", Conversation(), Sampling())
    session._heed("a question")
    assert [exchange.answer for exchange in session._said.exchanges] == [partial]


def test_a_conversation_sends_what_was_answered() -> None:
    said = Conversation("Be kind.")
    assert [message.role for message in said.messages("a")] == ["system", "user"]
    said.exchanges.append(Exchange("a", Answer("A", "stop", "m"), [], Sampling()))
    said.unanswered = "lost"
    assert [message.content for message in said.messages("b")] == ["Be kind.", "a", "A", "b"]
    assert [message.content for message in said.before_last().messages("a")] == ["Be kind.", "a"]
    assert Conversation().messages() == []


def test_options_that_came_later_change_no_id_that_was_there() -> None:
    def task(sampling: Sampling) -> str:
        return Task("asm", "LDA", "source", tuple(HELLO), sampling, 1, 0).id

    assert task(Sampling()) == "13aa4b95d4686ac1dc8638543b35679f52744c6d7757ace2c771e4e9f809843f"
    assert len({task(Sampling()), task(Sampling(top_k=1)), task(Sampling(stop=("x",)))}) == 3


# feedback --------------------------------------------------------------------------------------------------------------


def rated(answer: str) -> Feedback:
    return Feedback(
        id=answer_id("m", "d", HELLO, answer), time=1.5, node="local", model="m", messages=HELLO, answer=answer, rating="up"
    )


def test_ratings_of_many_sessions_are_all_kept_behind_a_torn_line(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    path = feedback.keep(settings, rated("first \x1b[31m key=sk-123"))
    with path.open("ab") as file:
        file.write(b'{"answer":"torn')
    threads = [threading.Thread(target=feedback.keep, args=(settings, rated(f"{number}"))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = list(read_rows(path, Feedback))
    assert rows[0] == rated("first \x1b[31m key=sk-123"), "nothing is taken out"
    assert sorted(row.answer for row in rows[1:]) == [str(number) for number in range(8)]


def test_rows_of_a_newer_version_are_read() -> None:
    row = {**rated("x").model_dump(), "version": 2, "mood": "good"}
    assert Feedback.model_validate(row).version == 2


# many ------------------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str, name: str = "in.txt", system: str = "") -> list[tuple[str, list[str]]]:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return [
        (question.id, [message.content for message in question.task.messages])
        for question in read_questions(path, "m", system, Sampling())
    ]


def test_inputs_are_lines_or_jsonl(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeffone\r\n\r\n two \x0b x", system="S") == [("1", ["S", "one"]), ("3", ["S", "two \x0b x"])]
    rows = '{"prompt": "p", "id": 5}\n{"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]}'
    assert read(tmp_path, rows, system="S") == [("5", ["S", "p"]), ("2", ["own", "q"])]
    assert read(tmp_path, "not json\n{}") == [("1", ["not json"]), ("2", ["{}"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompt"),
        ('{"prompt": "x"}\nplain', "in.jsonl:2: Invalid JSON"),
        ('{"prompt": "x"}\n\n{"prompt": ""}', "in.jsonl:3: .*needs either"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}', "in.jsonl:1: .*needs either"),
        ('{"messages": [{"role": "robot", "content": "y"}]}', "in.jsonl:1: messages.0.role"),
        ('{"messages": [{"role": "assistant", "content": "y"}]}', "in.jsonl:1: the last message"),
        (
            '{"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}',
            "in.jsonl:1: there are two system messages",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text, "in.jsonl")


def test_a_file_of_one_json_document_is_no_list_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in.json:1: "):
        read(tmp_path, '[\n  {"prompt": "x"}\n]\n', "in.json")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(ConfigError, match=r"in.txt:2: this is no UTF-8"):
        read_questions(tmp_path / "in.txt", "m", "", Sampling())


def test_equal_prompts_are_requests_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("same\nsame\nother\n")
    ids = [question.task.id for question in read_questions(tmp_path / "in.txt", "m", "", Sampling())]
    assert len(set(ids)) == 3
    hotter = [question.task.id for question in read_questions(tmp_path / "in.txt", "m", "", Sampling(temperature=1))]
    assert not set(ids) & set(hotter)


def line_of(question: Question | None, answer: str, error: str = "", **more: Any) -> str:
    """A line of an output as it is written."""
    request, number = (question.task.id, question.line) if question else ("another", 1)
    row = {"answer": answer, "digest": "d" * 64, "error": error, "id": str(number), "line": number, "request": request, **more}
    return json.dumps(row, sort_keys=True, separators=(",", ":"))


def test_what_is_owed_is_what_has_no_answer(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\nb\nc\nd\n")
    questions = read_questions(tmp_path / "in.txt", "m", "", Sampling())
    output = tmp_path / "out.jsonl"
    assert still_owed(output, questions).owed == questions and not output.exists()
    answered, failed, foreign = line_of(questions[0], "A", newer=1), line_of(questions[1], "", "down"), line_of(None, "", "old")
    last = line_of(questions[2], "C", digest="e" * 64)
    output.write_text("\n".join([answered, failed, foreign, last]))  # an editor has taken the last newline away
    kept = still_owed(output, questions)
    assert [question.line for question in kept.owed] == [2, 4]
    assert (kept.digests, kept.foreign) == (["d" * 64, "e" * 64], 1)
    assert output.read_text() == "\n".join([answered, foreign, last, ""])


def test_answers_follow_their_prompts_to_other_lines(tmp_path: Path) -> None:
    source, output, link = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b", "id": "x"}\n')
    output.write_text("\n".join([line_of(each, "A") for each in read_questions(source, "m", "", Sampling())] + [""]))
    link.symlink_to(output)
    source.write_text('{"prompt": "new"}\n{"prompt": "b", "id": "y"}\n{"prompt": "a"}\n')
    kept = still_owed(link, read_questions(source, "m", "", Sampling()))
    assert [question.line for question in kept.owed] == [1]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["line"], row["id"]) for row in rows] == [(3, "3"), (2, "y")] and link.is_symlink()


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="is no file"):
            still_owed(path, [])


@pytest.mark.parametrize("zeros", [bytes(4096) + b'"}', b'{"answer":"' + bytes(9) + b'"}', b'{"a' + bytes(9)], ids=range(3))
def test_what_a_power_cut_has_left_is_cut_off_and_asked_again(tmp_path: Path, zeros: bytes) -> None:
    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    questions = read_questions(tmp_path / "in.txt", "m", "", Sampling())
    output = tmp_path / "out.jsonl"
    first, last = line_of(questions[0], "A"), line_of(questions[2], "C")
    output.write_bytes(b"\n".join([first.encode(), zeros, last.encode(), b""]))
    assert [question.line for question in still_owed(output, questions).owed] == [2, 3]
    assert output.read_text() == first + "\n"


@pytest.mark.parametrize(
    "text",
    ["\0\0\0 ftypmp42\n", 'x\0\n{"answer":"', "dear diary", '{"id": 1}\n', '{"answer": 1, "request": 2}\n', 'x\n{"answer":"'],
)
def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path, text: str) -> None:
    output = tmp_path / "out"
    output.write_text(text)
    with pytest.raises(StoreCorrupt):
        still_owed(output, [])
    assert output.read_text() == text


def test_one_process_writes_an_output(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with output_held(settings, tmp_path / "out"), pytest.raises(StoreHeld), output_held(settings, tmp_path / "out"):
        pass
    with output_held(settings, tmp_path / "out"):
        pass
