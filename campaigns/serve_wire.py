"""What OpenAI's clients send to `hafs serve` and get: https://platform.openai.com/docs/api-reference/chat.

What would change the answer and cannot be done is refused by name; what says nothing about it (user, metadata) is ignored.
"""

import json
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agents.task import Completion, Sampling
from config.contracts.sample import Message
from config.errors import BadRequest

_NEUTRAL: dict[str, tuple[Any, ...]] = {  # the values at which nothing is asked for
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None


class ChatRequest(BaseModel):
    """`model` may be left out: one model is served. null is what is not said, as OpenAI has it."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"example": {"messages": [{"role": "user", "content": "Hello!"}]}})

    model: str = ""
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    def sampling(self, num_ctx: int) -> Sampling:
        """Raises BadRequest for what cannot be done."""
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
                raise BadRequest(f"{name} is not supported here", parameter=name)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            max_tokens=self.max_completion_tokens or self.max_tokens or num_ctx,
            num_ctx=num_ctx,
            seed=self.seed,
            schema=self._schema(),
            stop=tuple(filter(None, stop)),  # an empty one would end every answer before it begins
        )

    def _schema(self) -> str:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return ""
        if wanted.type == "json_object":
            return json.dumps({"type": "object"})
        schema = (wanted.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            raise BadRequest("response_format.json_schema has no schema", parameter="response_format")
        return json.dumps(schema)


class Reply:
    """One answer in OpenAI's words; all its parts have one id."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}

    def piece(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage(self, answer: Completion) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)}


def _usage(answer: Completion) -> dict[str, int]:
    asked, said = answer.usage.prompt_tokens, answer.usage.completion_tokens
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
