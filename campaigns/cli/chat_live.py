"""The conversation of `hafs chat` on a terminal.

Nothing that goes wrong with one question ends the session: it is told, the conversation is what it was before, and the next
question looks for the server anew. Ctrl-C stops what is under way; only /quit and the end of the input end it.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agents.task import Sampling
from campaigns import feedback
from campaigns.chat import Answer, Conversation, Exchange, ask, look_for, written
from campaigns.chat_commands import COMMANDS, PARAMETERS, changed, parse, rating, setting
from campaigns.cli import chat_prompt, render
from campaigns.serving import Server, server_of
from campaigns.sync.remote import Node, connect
from config.contracts.feedback import Feedback, answer_id
from config.errors import BadRequest, ConfigError, HafsError, ProviderError, translate_os_errors
from config.files import write_atomic
from config.settings import Settings


def ask_one(settings: Settings, node: str, model: str, system: str, question: str, sampling: Sampling) -> None:
    """One answer, shown as it comes. Raises what `campaigns.chat.ask` does, and ProviderError for one that was cut."""
    text = chat_prompt.standard_input() if question == "-" else question
    if not text.strip():
        raise ConfigError("there is no question", hint="give one with --prompt, or through standard input with --prompt -")
    with connect(settings, node) as remote:
        answer = _answered(remote, None, model, Conversation(system), text, sampling)
    if answer.ended == "stopped":
        raise KeyboardInterrupt
    if answer.ended == "length":
        raise ProviderError(_why_cut(answer, sampling), hint="ask for more with --max-tokens and --num-ctx")


def converse(settings: Settings, node: str, model: str, system: str, sampling: Sampling) -> None:
    """Questions and answers until /quit or the end of the input. Raises where node, server or model are not there at first."""
    with connect(settings, node) as remote:
        with server_of(remote) as server:
            _tell_started(server.started)
            model = look_for(server.url, model)
        if chat_prompt.on_terminal():
            render.note(f"{model} on {node}; /help lists commands, Ctrl-D ends")
        _Session(settings, remote, server, model, Conversation(system), sampling).run()


def _answered(node: Node, found: Server | None, model: str, before: Conversation, question: str, sampling: Sampling) -> Answer:
    """The server is asked for each time: the one that was `found` before may have ended meanwhile."""
    answer: Answer | None = None
    try:
        with server_of(node, before=found) as server, _shown(model) as show:
            _tell_started(server.started)
            answer = ask(server.url, model, before.messages(question), sampling, show)
    except KeyboardInterrupt:
        if answer is None:
            raise  # else it is a second one, while the way to the server is closed
    if not answer.text.strip():
        render.note("the answer is empty")
    return answer


def _tell_started(started: bool) -> None:
    if started:
        render.note("the embedded model server was started; it ends by itself after 15 idle minutes")


@contextmanager
def _shown(model: str) -> Iterator[Callable[[str], None]]:
    """Shows pieces of an answer; until the first one a terminal sees that it is waited for."""
    waiting = render.console.status(f"waiting for {render.printable(model)}") if render.on_screen() else None
    begun = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every console of Windows has every character

    def show(piece: str) -> None:
        nonlocal begun
        if waiting and not begun:
            waiting.stop()
        begun = True
        sys.stdout.write(render.printable(piece))  # as it is: the terminal folds it, also when it is resized meanwhile
        sys.stdout.flush()

    if waiting:
        waiting.start()
    try:
        yield show
    finally:
        if waiting:
            waiting.stop()
        if begun:
            show("\n")


def _why_cut(answer: Answer, sampling: Sampling) -> str:
    used = answer.usage.prompt_tokens + answer.usage.completion_tokens
    if answer.usage.completion_tokens < sampling.max_tokens and used >= sampling.num_ctx - 1:
        return f"the answer was cut: the conversation fills the context window num_ctx, {sampling.num_ctx} tokens"
    return f"the answer was cut at {sampling.max_tokens} tokens (max_tokens)"


class _Session:
    def __init__(
        self, settings: Settings, node: Node, server: Server, model: str, said: Conversation, sampling: Sampling
    ) -> None:
        self._settings, self._node, self._server = settings, node, server
        self._model, self._said, self._sampling = model, said, sampling
        self._read = chat_prompt.reader(settings.chat_history, [f"/{word}" for word in COMMANDS])
        self._saved: set[Path] = set()
        self._person = chat_prompt.on_terminal()
        self._stopped = False
        self._failed = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "system": self._system,
            "set": self._set,
            "rate": self._rate,
            "retry": self._retry,
            "undo": self._undo,
            "clear": self._clear,
            "save": self._save,
            "model": self._switch,
            "info": self._info,
        }

    def run(self) -> None:
        """Until the end. Raises ProviderError where nobody was there to see that something was not done."""
        going = True
        while going:
            try:
                going = self._next()
            except KeyboardInterrupt:  # nothing is done here: the next one may come at any moment
                if not self._person:
                    raise
                self._stopped = True
        if self._failed and not self._person:
            raise ProviderError(f"{self._failed} of the lines were not answered or not done", hint="it is said above why")

    def _next(self) -> bool:
        """Mend what a Ctrl-C has left, and do what is typed next. False at the end."""
        if self._stopped:
            self._node.close()  # half a reply may lie in the connection: the next question makes a new one
            render.note("stopped")
            self._stopped = False
        try:
            typed = self._typed()
            return typed is not None and self._heed(typed)
        except HafsError as error:
            self._failed += 1
            self._tell(error)
            return True

    def _typed(self) -> str | None:
        """What was typed next; None at the end. Ctrl-C throws away what stands there."""
        while True:
            try:
                return self._read()
            except KeyboardInterrupt:
                if not self._person:
                    raise

    def _heed(self, typed: str) -> bool:
        """Do what was typed. False: the session is to end."""
        command = parse(typed)
        if command is None:
            if typed.strip():
                self._ask(self._said, typed.strip())
            return True
        word, rest = command
        if word == "quit":
            return False
        self._commands[word](chat_prompt.unquoted(rest))
        return True

    def _ask(self, before: Conversation, question: str) -> None:
        """Ask, and keep the answer behind what was said `before`. If there is none, all stays as it was."""
        if before is self._said:
            before.unanswered = question
        try:
            answer = _answered(self._node, self._server, self._model, before, question, self._sampling)
        except HafsError as error:
            self._failed += 1
            self._tell(error)
            return render.note("  the question is not part of the conversation; /retry asks it again")
        exchange = Exchange(question, answer, before.messages(question), self._sampling)
        self._said = Conversation(self._said.system, [*before.exchanges, exchange])
        if answer.ended == "stopped":
            render.note("stopped; what came is kept. /retry asks again, /undo takes it back")
        elif answer.ended == "length":
            render.note(f"{_why_cut(answer, self._sampling)}; /set changes that, /retry asks again")

    def _tell(self, error: HafsError) -> None:
        hint = error.hint
        if isinstance(error, BadRequest) and error.parameter == "num_ctx":
            hint = "/set num_ctx raises it; /undo and /clear make the conversation shorter"
        render.note(f"error: {error}" + (f"\n  {hint}" if hint else ""))

    # --- commands ----------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        for word, command in COMMANDS.items():
            render.line(f"  {f'/{word} {command.takes}':<24}{command.does}")
        render.line('  Enter sends; Alt-Enter begins a new line, and so does Enter between two """')

    def _system(self, text: str) -> None:
        if text:
            self._said.system = "" if text == "off" else text
        render.note(f"system message: {self._said.system}" if self._said.system else "no system message but the model's own")

    def _set(self, text: str) -> None:
        if text:
            self._sampling = changed(self._sampling, text)
        render.note(", ".join(f"{name} {setting(self._sampling, name)}" for name in PARAMETERS))

    def _rate(self, text: str) -> None:
        word, note = rating(text)
        last = self._last("there is no answer to rate yet")
        answer, asked = last.answer, list(last.asked)
        row = Feedback(
            id=answer_id(answer.model, answer.digest, asked, answer.text),
            time=time.time(),
            node=self._node.name,
            model=answer.model,
            digest=answer.digest,
            messages=asked,
            answer=answer.text,
            ended=answer.ended,
            sampling=last.sampling.named,
            rating=word,
            note=note,
        )
        render.note(f"rated {word}: {feedback.keep(self._settings, row)}")

    def _retry(self, _: str) -> None:
        if self._said.unanswered:
            return self._ask(self._said, self._said.unanswered)
        self._ask(self._said.before_last(), self._last("nothing was asked yet").question)

    def _undo(self, _: str) -> None:
        taken = self._last("there is nothing to take back")
        self._said = self._said.before_last()
        render.note(f"taken back: {_start(taken.question)}")

    def _clear(self, _: str) -> None:
        self._said = Conversation(self._said.system)
        render.note("a new conversation")

    def _save(self, name: str) -> None:
        try:
            path = Path(name).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError(f"{name}: {error}", hint="write the folder out") from None
        if not name.isprintable():
            raise ConfigError("that is no name of a file", hint="/save FILE")
        with translate_os_errors(path):
            there = path.exists()
        if there and path not in self._saved:
            raise ConfigError(f"{path} exists already", hint="choose another name: nothing is written over")
        write_atomic(path, written(self._said, self._model, path.suffix == ".json").encode())
        self._saved.add(path)
        render.note(f"saved: {path}")

    def _switch(self, name: str) -> None:
        with server_of(self._node, before=self._server) as server:
            self._model = look_for(server.url, name)
        render.note(f"now {self._model}; the conversation goes on")

    def _info(self, _: str) -> None:
        with server_of(self._node, before=self._server) as server:
            render.line(f"model     {self._model} on {self._node.name} ({server.url})")
        render.line(f"asked     {', '.join(f'{name} {setting(self._sampling, name)}' for name in PARAMETERS)}")
        own = "the model's own"
        render.line(f"system    {_start(self._said.system) or own}")
        render.line(f"said      {len(self._said.exchanges)} questions and answers")
        if self._said.exchanges and (usage := self._said.exchanges[-1].answer.usage).prompt_tokens:
            used, latency_s = usage.prompt_tokens + usage.completion_tokens, self._said.exchanges[-1].answer.latency_s
            render.line(f"context   {used} of {self._sampling.num_ctx} tokens")
            render.line(f"last      {usage.completion_tokens} tokens in {latency_s:.1f} s")

    def _last(self, missing: str) -> Exchange:
        if not self._said.exchanges:
            raise ConfigError(missing, hint="ask something first")
        return self._said.exchanges[-1]


def _start(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"
