"""Which template a GGUF without one of its own in the request gets. The rule is Ollama's, so that a model answers here as there.

A GGUF whose Jinja template is close to a known one (edit distance under 100) is rendered with that family's own Go template,
and gets its stops: its prompt may differ from the Jinja's, most of all in a default system message. Any other GGUF keeps
its own Jinja.
"""

from dataclasses import dataclass

MAX_DISTANCE = 100
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
CHATML_STOPS = ["<|im_start|>", "<|im_end|>"]
_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_SYSTEM = (
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
)
CHATML_JINJA = (
    "{% for message in messages %}" + _TURN + _OPEN,
    "{% for message in messages %}" + _SYSTEM + _TURN + _OPEN,
)


@dataclass(frozen=True)
class Family:
    """A known chat format: its Go template and the stops that go with it."""

    name: str
    template: str
    stops: list[str]


def family_of(jinja: str) -> Family | None:
    """The known family that a GGUF's `tokenizer.chat_template` is close to."""
    if any(_distance_under(MAX_DISTANCE, jinja, known) for known in CHATML_JINJA):
        return Family("chatml", CHATML, CHATML_STOPS)
    return None


def _distance_under(limit: int, first: str, second: str) -> bool:
    """Whether the Levenshtein distance is under `limit`."""
    if abs(len(first) - len(second)) >= limit:
        return False
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
        if min(row) >= limit:
            return False
    return row[-1] < limit
