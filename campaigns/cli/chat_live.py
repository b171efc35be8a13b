"""The conversation of `hafs chat` on a terminal."""

from agents.task import Sampling
from campaigns.chat import ask_once
from campaigns.cli import render
from config.contracts.sample import Message


def converse(url: str, model: str, system: str, prompt: str, sampling: Sampling) -> None:
    """One answer to `prompt`, or a conversation until an empty line or the end of the input."""
    history = [Message(role="system", content=system)] if system else []
    question = prompt or _read()
    while question:
        history.append(Message(role="user", content=question))
        history.append(Message(role="assistant", content=ask_once(url, model, history, sampling, render.raw)))
        render.line()
        question = "" if prompt else _read()


def _read() -> str:
    try:
        return render.console.input("[bold]>[/bold] ").strip()
    except EOFError:
        return ""
