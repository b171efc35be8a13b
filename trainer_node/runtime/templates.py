"""How messages become a prompt. The rule is Ollama's, so that a model answers here as it does there.

A GGUF whose Jinja template is close to a known one (edit distance under 100) is rendered with that family's own Go template,
and gets its stops: its prompt may differ from the Jinja's, most of all in a default system message. Any other GGUF keeps
its own Jinja.
Go templates are read as far as chat templates without tools need them: text, trim markers, if / else if / else,
`range .Messages`, fields, `eq ne and or not`. What is beyond that is refused at create, never rendered wrongly.
"""

import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

MAX_DISTANCE = 100
FIELDS = {"System", "Messages", "Role", "Content", "Tools", "ToolCalls", "Thinking", "Images"}  # the last four: always empty here
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


class TemplateError(ValueError):
    """The template is broken, or beyond what is rendered here."""


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


class GoTemplate:
    """A parsed template. Raises TemplateError for a broken or unsupported one."""

    def __init__(self, text: str) -> None:
        self._nodes = _Parser(text).parse()
        if not any(isinstance(node, _Range) for node in self._nodes):
            raise TemplateError("only templates with {{ range .Messages }} at the top are supported here")

    def render(self, messages: list[Message]) -> str:
        """The prompt. Neighbours of one role become one message, as Ollama does; `.System` is all system messages."""
        merged: list[Message] = []
        for message in messages:
            if merged and merged[-1]["role"] == message["role"] != "tool":
                merged[-1]["content"] += "\n\n" + message["content"]
            else:
                merged.append(dict(message))
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [{"Role": message["role"], "Content": message["content"]} for message in merged]
        root = {"System": system, "Messages": turns}
        return _run(self._nodes, root, root)


@dataclass
class _Show:
    value: Any


@dataclass
class _If:
    branches: list[tuple[Any, list[Any]]]  # condition (None: else), body


@dataclass
class _Range:
    body: list[Any]


@dataclass
class _Field:
    name: str
    of_root: bool


@dataclass
class _Call:
    function: str
    arguments: list[Any]


class _Parser:
    def __init__(self, text: str) -> None:
        self._pieces = _split(text)  # text and (action,), in turn
        self._depth = 0

    def parse(self) -> list[Any]:
        nodes, end = self._block()
        if end:
            raise TemplateError(f"template: :1: unexpected {{{{{end}}}}}")
        return nodes

    def _block(self) -> tuple[list[Any], str]:
        """Nodes up to the `end` or `else …` that closes this block, and that word; "" at the end of the text."""
        nodes: list[Any] = []
        while self._pieces:
            piece = self._pieces.pop(0)
            if isinstance(piece, str):
                nodes.append(piece)
                continue
            word, _, rest = piece[0].partition(" ")
            if word in ("end", "else"):
                return nodes, piece[0]
            nodes.append(self._action(word, rest.strip(), piece[0]))
        return nodes, ""

    def _action(self, word: str, rest: str, action: str) -> Any:
        if word == "if":
            return self._if(rest)
        if word == "range":
            return self._range(rest)
        return _Show(_expression(action))

    def _range(self, over: str) -> _Range:
        if over not in (".Messages", "$.Messages"):
            raise TemplateError(f"range over {over} is not supported here")
        body, end = self._block()
        if end != "end":
            raise TemplateError("template: :1: unexpected EOF" if not end else "else in a range is not supported here")
        return _Range(body)

    def _if(self, condition: str) -> _If:
        branches: list[tuple[Any, list[Any]]] = []
        test: Any = _expression(condition)
        while True:
            body, end = self._block()
            branches.append((test, body))
            if end == "end":
                return _If(branches)
            if not end:
                raise TemplateError("template: :1: unexpected EOF")
            rest = end.removeprefix("else").strip()
            test = _expression(rest.removeprefix("if").strip()) if rest else None


def _split(text: str) -> list[str | tuple[str]]:
    pieces: list[str | tuple[str]] = []
    trim, line = False, 1
    while text:
        before, opened, rest = text.partition("{{")
        line += before.count("\n")
        inside, closed, text = rest.partition("}}")
        if opened and not closed:
            raise TemplateError(f"template: :{line}: unclosed action")
        left, right = bool(re.match(r"-\s", inside)), bool(re.search(r"\s-$", inside))
        before = before.lstrip() if trim else before
        before = before.rstrip() if left else before
        pieces += [before] if before else []
        action = " ".join(inside[left : len(inside) - right].split())
        if opened and not action.startswith("/*"):
            pieces.append((action,))
        trim = right
    return pieces


def _expression(text: str) -> Any:
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', text)
    value = _pipeline(words)
    if words:
        raise TemplateError(f'"{text}" is not supported here')
    return value


def _pipeline(words: list[str]) -> Any:
    if words and words[0] in ("eq", "ne", "and", "or", "not"):
        function, arguments = words.pop(0), []
        while words and words[0] != ")":
            arguments.append(_operand(words))
        return _Call(function, arguments)
    return _operand(words)


def _operand(words: list[str]) -> Any:
    word = words.pop(0) if words else ""
    if word == "(":
        value = _pipeline(words)
        if not words or words.pop(0) != ")":
            raise TemplateError("template: :1: unclosed left paren")
        return value
    if word.startswith('"'):
        return word[1:-1].encode().decode("unicode_escape")
    field = re.fullmatch(r"(\$?)\.(\w+)", word)
    if not field or field[2] not in FIELDS:
        raise TemplateError(f'"{word}" is not supported here')
    return _Field(field[2], bool(field[1]))


def _run(nodes: list[Any], dot: Message, root: Message) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif isinstance(node, _Show):
            text += str(_value(node.value, dot, root) or "")
        elif isinstance(node, _Range):
            text += "".join(_run(node.body, message, root) for message in root["Messages"])
        else:
            chosen: list[list[Any]] = [body for test, body in node.branches if test is None or _value(test, dot, root)]
            text += _run(chosen[0], dot, root) if chosen else ""
    return text


def _value(expression: Any, dot: Message, root: Message) -> Any:
    if isinstance(expression, _Field):
        return (root if expression.of_root else dot).get(expression.name, "")
    if not isinstance(expression, _Call):
        return expression
    values = [_value(argument, dot, root) for argument in expression.arguments]
    match expression.function:
        case "eq":
            return values[0] in values[1:]
        case "ne":
            return values[0] != values[1]
        case "not":
            return not values[0]
        case "and":
            return next((value for value in values if not value), values[-1])
        case _:
            return next((value for value in values if value), values[-1])
