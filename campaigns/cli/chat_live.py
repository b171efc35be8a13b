"""The conversation of `hafs chat` on a terminal."""

from agents.task import Sampling
from campaigns.chat import ask_once
from campaigns.cli import render
from campaigns.serving import model_server
from config.contracts.sample import Message
from config.errors import ProviderError
from config.settings import Settings


def ask(settings: Settings, node: str, model: str, history: list[Message], sampling: Sampling) -> Message:
    """One answer, shown as it comes. The server is asked for each time: an idle one may have ended meanwhile."""
    with model_server(settings, node) as server:
        if server.started:
            render.note("the embedded model server was started; it ends by itself after 15 idle minutes")
        text = ask_once(server.url, model, history, sampling, render.raw)
    render.line()
    return Message(role="assistant", content=text)


def converse(settings: Settings, node: str, model: str, history: list[Message], sampling: Sampling) -> None:
    """Questions and answers until an empty line or the end of the input. A question that fails is told and forgotten."""
    while question := _read():
        asked = [*history, Message(role="user", content=question)]
        try:
            history = [*asked, ask(settings, node, model, asked, sampling)]
        except ProviderError as error:
            render.line()
            render.note(f"error: {error}\n  {error.hint}")


def _read() -> str:
    try:
        return render.console.input("[bold]>[/bold] ").strip()
    except EOFError:
        return ""
