"""The conversation of `hafs chat` on a terminal."""

from agents.task import Sampling
from campaigns.chat import ask_once
from campaigns.cli import render
from campaigns.serving import server_of
from campaigns.sync.remote import Node, connect
from config.contracts.sample import Message
from config.errors import NodeError, ProviderError
from config.settings import Settings


def ask(settings: Settings, node: str, model: str, history: list[Message], sampling: Sampling) -> Message:
    """One answer, shown as it comes."""
    with connect(settings, node) as remote:
        return _ask(remote, model, history, sampling)


def converse(settings: Settings, node: str, model: str, history: list[Message], sampling: Sampling) -> None:
    """Questions and answers until an empty line or the end of the input. A question that fails is told and forgotten."""
    with connect(settings, node) as remote:
        while question := _read():
            asked = [*history, Message(role="user", content=question)]
            try:
                history = [*asked, _ask(remote, model, asked, sampling)]
            except (ProviderError, NodeError) as error:
                render.line()
                render.note(f"error: {error}\n  {error.hint}")


def _ask(node: Node, model: str, history: list[Message], sampling: Sampling) -> Message:
    """The server is asked for each time: an idle one may have ended meanwhile."""
    with server_of(node) as server:
        if server.started:
            render.note("the embedded model server was started; it ends by itself after 15 idle minutes")
        text = ask_once(server.url, model, history, sampling, render.raw)
    render.line()
    return Message(role="assistant", content=text)


def _read() -> str:
    try:
        return render.console.input("[bold]>[/bold] ").strip()
    except EOFError:
        return ""
