"""A real terminal to type into: a tmux server of the test's own, with one window."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.waiting import wait_for

PATIENCE_S = 30
# tmux does not always learn how a command ended; a shell does. It outlives the Ctrl-C that is meant for the command.
SHELL = 'trap : INT; "$@"; echo "ended with $?"; exec cat'
ENDED = re.compile(r"^ended with (\d+)$", re.MULTILINE)


class Terminal:
    """A context manager. The command's environment is the one of this process."""

    def __init__(self, *command: str, columns: int = 80, lines: int = 40) -> None:
        self._command = command
        self._size = ["-x", str(columns), "-y", str(lines)]
        self._folder = Path(tempfile.mkdtemp(prefix="tmux-"))  # a socket's path has to be short

    def __enter__(self) -> Self:
        self._tmux("new-session", "-d", *self._size, "-c", str(Path.cwd()), "sh", "-c", SHELL, "sh", *self._command)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tmux("kill-server")
        shutil.rmtree(self._folder, ignore_errors=True)

    def type(self, text: str, prompt: str = ">") -> None:
        """A line, and Enter, once that prompt is there."""
        self.ready(prompt)
        self._tmux("send-keys", "-l", text)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Keys by their names: C-c, Up, M-Enter."""
        self._tmux("send-keys", *keys)

    def send(self, data: bytes) -> None:
        """Bytes, whatever they are."""
        self._tmux("send-keys", "-H", *(f"{byte:02x}" for byte in data))

    def paste(self, text: str) -> None:
        """As a person does with the mouse: in brackets, where the program asks for them."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p")

    def resize(self, columns: int, lines: int) -> None:
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def text(self) -> str:
        """All that was shown, a line that the terminal has folded being one."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def see(self, text: str, times: int = 1) -> str:
        """Wait until that is shown so often; gives all that is shown then."""
        self._wait(f"{text!r} on the terminal", lambda: self.text().count(text) >= times)
        return self.text()

    def ready(self, prompt: str = ">") -> None:
        """Wait until the last line is an empty prompt: only now do the keys mean what its program makes of them."""
        self._wait(f"{prompt!r} at the end", lambda: self.text().rstrip().splitlines()[-1:] == [prompt])

    def ended(self) -> int:
        """Wait for the end of the command; its exit code."""
        self._wait("end of the command", lambda: ENDED.search(self.text()))
        return int(ENDED.findall(self.text())[-1])

    @property
    def title(self) -> str:
        return self._tmux("display-message", "-p", "#{pane_title}").strip()

    def _wait(self, what: str, ready: Callable[[], object]) -> None:
        try:
            wait_for(what, ready, PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.text()}") from None

    def _tmux(self, *words: str) -> str:
        argv = ["tmux", "-S", str(self._folder / "socket"), "-f", "/dev/null", *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout
