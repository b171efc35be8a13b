"""Talk to a model: questions, answers as they come, and the conversation that the model is sent next.

- What is kept of a conversation is what was answered: a question that failed is not part of it.
- An answer that its reader stopped is kept as far as it came, and says so.
- Nothing is cut in silence: a conversation that does not fit the context window is refused, with numbers.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

import anyio

from agents.providers.ollama import OllamaProvider
from agents.providers.transport import PROMPT_CUT
from agents.task import Sampling, Usage
from config.contracts.sample import Message
from config.errors import BadRequest, ModelMissing, ProviderError, ProviderUnavailable

Ended = Literal["stop", "length", "stopped"]


@dataclass(frozen=True)
class Answer:
    """`usage` is zero where the answer was stopped; `model` is the model's full name at the server, `digest` what it is."""

    text: str
    ended: Ended
    model: str
    digest: str = ""
    usage: Usage = Usage()
    latency_s: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """`asked` is what the model was sent, as `sampling` says: system message and settings may have changed since."""

    question: str
    answer: Answer
    asked: Sequence[Message]
    sampling: Sampling


@dataclass
class Conversation:
    """What was said; an exchange is added by whoever got the answer. `unanswered` is a new question that failed."""

    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    unanswered: str = ""

    def messages(self, question: str = "") -> list[Message]:
        """All of it, as a model is sent it; with `question` at the end unless it is empty."""
        said = [Message(role="system", content=self.system)] if self.system else []
        for exchange in self.exchanges:
            said.append(Message(role="user", content=exchange.question))
            said.append(Message(role="assistant", content=exchange.answer.text))
        return [*said, Message(role="user", content=question)] if question else said

    def before_last(self) -> "Conversation":
        """As it was when the last answered question was asked."""
        return Conversation(self.system, self.exchanges[:-1])


def written(said: Conversation, model: str, as_json: bool) -> str:
    """A conversation as a file: Markdown, or JSON."""
    messages = said.messages()
    if as_json:
        return json.dumps({"model": model, "messages": [message.model_dump() for message in messages]}, indent=1) + "\n"
    return "".join(
        f"## {model if message.role == 'assistant' else message.role}\n\n{message.content}\n\n" for message in messages
    )


def ask(url: str, model: str, messages: Sequence[Message], sampling: Sampling, show: Callable[[str], None]) -> Answer:
    """One answer from the server at `url`; its pieces go to `show` as they come. Ctrl-C stops an answer that has begun.

    Raises:
        ModelMissing: there is no such model; it names those there are.
        BadRequest: the messages do not fit the context window.
        ProviderError: the server did not answer, or not to the end.
        KeyboardInterrupt: Ctrl-C, before the first piece.
    """
    said: list[str] = []
    known: dict[str, str] = {}

    async def run() -> Answer:
        provider = OllamaProvider(url)
        try:
            full, digest = await find_model(provider, url, model)
            known[full] = digest
            async with aclosing(provider.told(full, messages, sampling)) as parts:
                async for part in parts:
                    if not isinstance(part, str):
                        require_told(url, part.finish_reason, part.detail, sampling)
                        ended: Ended = "length" if part.finish_reason == "length" else "stop"
                        return Answer(part.text, ended, full, digest, part.usage, part.latency_s)
                    said.append(part)
                    show(part)
            raise ProviderUnavailable(f"{url} did not say how its answer ended", hint="look at the server's log")
        finally:
            await provider.aclose()

    try:
        return anyio.run(run)
    except KeyboardInterrupt:
        if not said:
            raise
        full, digest = next(iter(known.items()))
        return Answer("".join(said), "stopped", full, digest)


def look_for(url: str, model: str) -> str:
    """The full name of a model at `url`. Raises ModelMissing naming the models there are, ProviderError."""

    async def run() -> str:
        provider = OllamaProvider(url)
        try:
            return (await find_model(provider, url, model))[0]
        finally:
            await provider.aclose()

    return anyio.run(run)


async def find_model(provider: OllamaProvider, where: str, model: str) -> tuple[str, str]:
    """The full name and the digest of a model, whose name may lack its `:latest`. Raises ModelMissing naming those there are."""
    there = await provider.digests()
    for name in (model, f"{model}:latest"):
        if name in there:
            return name, there[name]
    known = ", ".join(sorted(there)) or "none"
    raise ModelMissing(f'there is no model "{model}" at {where}', hint=f"models there: {known}")


def require_told(where: str, finish: str, detail: str, sampling: Sampling) -> None:
    """Raise for an answer that is none: BadRequest to a prompt that was cut, else ProviderError. One that was cut is one."""
    if finish in ("stop", "length"):
        return
    if detail == PROMPT_CUT:
        raise BadRequest(
            f"{where} answered a part of the conversation: it does not fit num_ctx {sampling.num_ctx}",
            parameter="num_ctx",
            hint="raise num_ctx, or shorten it",
        )
    raise ProviderError(f"{where} broke off its answer: {detail}", hint="ask again")
