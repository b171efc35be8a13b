"""What a person thought of an answer: the rows of feedback.jsonl.

A row is whole by itself: all that the model was sent, what it said, how it was asked. `id` names the answer, so one that was
rated twice has two rows, of which the last one counts.
"""

from typing import Literal

from pydantic import JsonValue

from config.contracts.base import Tolerant, content_id
from config.contracts.sample import Message

FEEDBACK_VERSION = 1

Rating = Literal["up", "down"]


class Feedback(Tolerant):
    """One rating.

    `time` is in Unix seconds; `node` has the model server; `digest` is what stood behind the tag `model`, empty where the server
    did not say. `messages` end with the question. `ended` is how the answer did: stop, length (cut at max_tokens or by the
    context window), stopped (by the person who read it).
    """

    version: int = FEEDBACK_VERSION
    id: str
    time: float
    node: str
    model: str
    digest: str = ""
    messages: list[Message]
    answer: str
    ended: str = "stop"
    sampling: dict[str, JsonValue] = {}
    rating: Rating
    note: str = ""


def answer_id(model: str, digest: str, messages: list[Message], answer: str) -> str:
    """The id of an answer: a hash of who gave it, to what, and its text."""
    return content_id([model, digest, [message.model_dump() for message in messages], answer])
