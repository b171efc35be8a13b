"""What is typed in a chat: with line editing and a history on a terminal, plain lines elsewhere.

Enter sends; Alt-Enter begins a new line, and so does Enter between two \"\"\". What is pasted stays in one piece.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from config.errors import ConfigError, translate_os_errors

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'
Reader = Callable[[], str | None]


def on_terminal() -> bool:
    """Whether there is a person to talk with."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def reader(history: Path, words: list[str]) -> Reader:
    """A function that gives what was typed next, None at the end.

    It raises KeyboardInterrupt for Ctrl-C, and ConfigError for a line that is no text.

    Args:
        history: the file of what was typed in earlier sessions; nobody else may read it.
        words: completed by Tab at the beginning of a line.
    """
    return _terminal(history, words) if on_terminal() else _next_line


def standard_input() -> str:
    """All of it. Raises ConfigError where it is no text."""
    return _decoded(sys.stdin.buffer.read())


def unquoted(text: str) -> str:
    """What stands between two \"\"\"; all of it where nothing does."""
    inner = text.strip()
    if len(inner) >= 2 * len(QUOTES) and inner.startswith(QUOTES) and inner.endswith(QUOTES):
        return inner[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


def _decoded(given: bytes) -> str:
    try:
        return given.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"what came through standard input is no UTF-8 (byte {error.start})", hint="convert it first") from None


def _terminal(history: Path, words: list[str]) -> Reader:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import FileHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk costs the history a line, and nobody the conversation
                _keep_private(history)
                super().store_string(string)

    with translate_os_errors(history):
        history.parent.mkdir(parents=True, exist_ok=True)
        _keep_private(history)
    session: PromptSession[str] = PromptSession(
        history=History(str(history)),
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation=FormattedText([("", ". ")]),
        enable_open_in_editor=False,
    )

    def read() -> str | None:
        try:
            with session.input.raw_mode():  # on a dumb terminal the prompt is shown before its keys are read: none may be lost
                typed = session.prompt(FormattedText([("bold", "> ")]))
        except EOFError:
            return None
        return unquoted(typed.encode(errors="replace").decode())  # bytes that are no UTF-8 came as what no file can hold

    return read


def _keep_private(path: Path) -> None:
    handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    try:
        if os.name == "posix":  # it may have been there
            os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def _keys() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # Enter that was typed while an answer came, before this prompt was there
    def _(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.text.count(QUOTES) == 1:
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def _(event: "KeyPressEvent") -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _next_line() -> str | None:
    line = sys.stdin.buffer.readline()
    return _decoded(line) if line else None
