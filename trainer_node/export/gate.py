"""Smoke gate: a tuned model that is not served as it was trained, or does not end its turn, is never given the alias."""

from collections.abc import Sequence
from typing import Any

from config.errors import GateFailed
from trainer_node.ollama import OllamaApi

MAX_TOKENS = 128


def require_gate(api: OllamaApi, tag: str, prompt_tokens: int, messages: list[dict[str, str]], special: Sequence[str]) -> str:
    """Ask the registered model the probe; tells its answer.

    The probe is sent twice: with the system message, and without it, as a person would: the registered one has to take its place.

    Args:
        prompt_tokens: length of the prompt as it was trained, for the same messages.
        messages: the probe, the system message first if there is one.
        special: template tokens that may not appear in an answer.

    Raises:
        GateFailed: with what was wrong and what was answered.
    """
    bare = [message for message in messages if message["role"] != "system"]
    reply: dict[str, Any] = {}
    for sent in (bare, messages):
        reply = api.chat(tag, sent, options={"num_predict": MAX_TOKENS, "temperature": 0})
        served = int(reply.get("prompt_eval_count", 0))
        if served != prompt_tokens:
            raise _failed(
                tag,
                f"the server read {served} prompt tokens, the same messages were trained with {prompt_tokens}",
                "the server renders another template: use another server version, or a base whose own template it keeps",
            )
    text = str(reply["message"]["content"])
    if reply.get("done_reason") != "stop":
        raise _failed(tag, f"it did not end its turn within {MAX_TOKENS} tokens: {text!r}", "train longer, or on more rows")
    leaked = [token for token in special if token in text]
    if leaked:
        raise _failed(tag, f"template tokens in its answer ({', '.join(leaked)}): {text!r}", "train longer, or on more rows")
    if not text.strip():
        raise _failed(tag, "its answer is empty", "train longer, or on more rows")
    return text


def _failed(tag: str, reason: str, hint: str) -> GateFailed:
    return GateFailed(f"{tag} did not pass the smoke gate: {reason}", hint=f"{hint}; the files are kept, the alias was not moved")
