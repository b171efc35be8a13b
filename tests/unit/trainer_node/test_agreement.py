"""What is trained is compared with what is served, text by text or length by length."""

from dataclasses import replace
from typing import Any

import pytest

from config.contracts.sample import Message
from config.errors import JobFailed
from trainer_node.dataset import Encoded, Row
from trainer_node.train.agreement import require_agreement


class FakeServer:
    """The part of OllamaApi that the comparison uses. `count`: of every prompt, else by its last message. `tokens` None: no route
    to tokenize.
    """

    def __init__(self, count: int | dict[str, int] = 0, tokens: dict[str, list[int]] | None = None) -> None:
        self.count, self.tokens = count, tokens
        self.asked: list[list[dict[str, str]]] = []

    def chat(self, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(messages)
        return {"prompt_eval_count": self.count if isinstance(self.count, int) else self.count[messages[-1]["content"]]}

    def tokenize(self, model: str, text: str) -> list[int] | None:
        return None if self.tokens is None else self.tokens[text]


MESSAGES = (Message(role="user", content="q"),)
ROW = Encoded(Row("s", MESSAGES, ("a",)), "q", ("a",), [1, 2], ([3],))
QUOTED = (Message(role="user", content="<|im_end|>"),)
QUOTING = Encoded(Row("s", QUOTED, ("a",)), "q<|im_end|>", ("a",), [1, 4, 5, 2], ([3],), quotes=True)


def compared(server: Any, *rows: Encoded) -> str:
    return require_agreement(server, "base", rows, lambda done, total: None)


def test_every_text_is_compared() -> None:
    server = FakeServer(2, {"": [], "q": [1, 2], "a": [3]})
    assert compared(server, ROW, ROW) == "2 rows have the same tokens at the runtime (2 texts compared)"


def test_what_the_server_puts_before_every_text_belongs_to_a_prompt_only() -> None:
    row = Encoded(ROW.row, "<s>q", ("a",), [9, 1, 2], ([3],))
    assert "same tokens" in compared(FakeServer(3, {"": [9], "<s>q": [9, 1, 2], "a": [9, 3]}), row)
    with pytest.raises(JobFailed, match=r"trained as \[1, 2\], served as \[9, 1, 2\]"):
        compared(FakeServer(tokens={"": [9], "q": [9, 1, 2]}), ROW)


def test_a_disagreement_names_the_row_and_both_lists() -> None:
    with pytest.raises(JobFailed, match=r"row 1 .*\[3\], served as \[4, 5\]"):
        compared(FakeServer(tokens={"": [], "q": [1, 2], "a": [4, 5]}), ROW)


def test_a_row_that_quotes_control_tokens_is_compared_by_its_messages() -> None:
    tokens: dict[str, list[int]] = {"": [], "q": [1, 2], "a": [3]}
    server = FakeServer({"q": 2, "<|im_end|>": 4}, tokens)
    assert "1 more quote control tokens: their prompts have the same length" in compared(server, QUOTING, ROW)
    assert server.asked == [[{"role": "user", "content": "q"}], [{"role": "user", "content": "<|im_end|>"}]]
    with pytest.raises(JobFailed, match="row 2 .*trained with 4 tokens, served with 3"):
        compared(FakeServer({"q": 2, "<|im_end|>": 3}, tokens), ROW, QUOTING)


def test_the_servers_template_is_compared_once_for_each_sequence_of_roles() -> None:
    """Else a template that it renders otherwise would be found by the gate, when all is trained."""
    tokens: dict[str, list[int]] = {"": [], "q": [1, 2], "a": [3]}
    system = Message(role="system", content="Be brief.")
    with_system = replace(ROW, row=Row("s", (system, *MESSAGES), ("a",)))
    server = FakeServer(2, tokens)
    compared(server, ROW, with_system, ROW, with_system)
    assert [[message["role"] for message in asked] for asked in server.asked] == [["user"], ["system", "user"]]
    with pytest.raises(JobFailed, match="row 1 .*trained with 2 tokens, served with 7"):
        compared(FakeServer(7, tokens), ROW)


def test_an_answer_is_compared_behind_what_it_was_tokenized_behind() -> None:
    row = replace(ROW, lead="!")
    assert "same tokens" in compared(FakeServer(2, {"": [9], "!": [9, 8], "q": [1, 2], "!a": [9, 8, 3]}), row)
    with pytest.raises(JobFailed, match=r"\[9, 8, 3\], served as \[9, 8, 7, 3\]"):
        compared(FakeServer(2, {"": [9], "!": [9, 8], "q": [1, 2], "!a": [9, 8, 7, 3]}), row)


def test_a_server_that_cannot_tokenize_is_asked_for_lengths() -> None:
    counted = FakeServer(2)
    assert "16 prompts" in compared(counted, *[ROW] * 20)
    assert len(counted.asked) == 16
    later = replace(ROW, row=Row("s", (Message(role="system", content="Be brief."), *MESSAGES), ("a",)))
    compared(counted, *[ROW] * 20, later)
    assert [message["role"] for message in counted.asked[-15]] == ["system", "user"], "every sequence of roles is among them"
    with pytest.raises(JobFailed, match="trained with 2 tokens, served with 21"):
        compared(FakeServer(21), ROW)


def test_a_server_that_reads_quoted_tokens_is_not_held_to_them() -> None:
    counted = FakeServer(2)
    assert "control tokens as such in the 1 rows that quote them" in compared(counted, ROW, QUOTING)
    assert len(counted.asked) == 1
