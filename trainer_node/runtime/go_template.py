"""Go templates, as far as chat templates without tools need them, rendered as Ollama renders them.

Known are text, trim markers, if / else if / else, `range .Messages`, fields, `eq ne and or not`. A template that names
`.Messages` gets the whole chat; any other is executed turn by turn with `.System`, `.Prompt` and `.Response`, the last time up to
its `.Response`. What is beyond that is refused at create, never rendered wrongly.
"""

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

# What comes with tools, thoughts, images and infilling, which are refused: always empty.
EMPTY_HERE = {"Tools", "ToolCalls", "Thinking", "Think", "IsThinkSet", "Images", "Suffix"}
ROOT_FIELDS = {"System", "Messages", "Prompt", "Response"} | EMPTY_HERE
MESSAGE_FIELDS = {"Role", "Content"} | EMPTY_HERE
LEAST, MOST = {"eq": 2, "ne": 2, "not": 1, "and": 1, "or": 1}, {"ne": 2, "not": 1}  # arguments of the functions
BLANKS = " \t\r\n"  # what a trim marker takes
SUPPORTED = "known here: if, else, range .Messages, eq, ne, and, or, not, .System .Messages .Prompt .Response .Role .Content"


class TemplateError(ValueError):
    """The template is broken, or beyond what is rendered here."""


class GoTemplate:
    """A parsed template. Raises TemplateError for a broken or unsupported one."""

    def __init__(self, text: str) -> None:
        self._nodes = _Parser(text).parse()
        names = set(_fields(self._nodes, ROOT_FIELDS))
        self._by_turn = "Messages" not in names
        if self._by_turn and "Response" not in names:
            self._nodes.append(_Show(RESPONSE))
        self._last_turn = _up_to_response(self._nodes)[0]

    def render(self, messages: list[Message]) -> str:
        """The prompt. Neighbours of one role become one message, as Ollama does."""
        merged: list[Message] = []
        for message in messages:
            if merged and merged[-1]["role"] == message["role"] != "tool":
                merged[-1]["content"] += "\n\n" + message["content"]
            else:
                merged.append(dict(message))
        return self._turns(merged) if self._by_turn else self._chat(merged, messages)

    def _chat(self, merged: list[Message], messages: list[Message]) -> str:
        """Executed once; `.System` is all system messages."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [{"Role": message["role"], "Content": message["content"]} for message in merged]
        root = {"System": system, "Messages": turns}
        return _run(self._nodes, root, root)

    def _turns(self, merged: list[Message]) -> str:
        """Executed once a turn: a system message, a prompt, its response. Messages of other roles are left out."""
        text = ""
        turn: Message = {}
        for message in merged:
            name = {"system": "System", "user": "Prompt", "assistant": "Response"}.get(message["role"])
            if name is None:
                continue
            ends = {"System": ("Prompt", "Response"), "Prompt": ("Response",), "Response": ()}[name]
            if any(turn.get(end) for end in ends):
                text += _run(self._nodes, turn, turn)
                turn = {}
            turn[name] = message["content"]
        return text + _run(self._last_turn, turn, turn)


@dataclass
class _Show:
    value: Any


@dataclass
class _If:
    branches: list[tuple[Any, list[Any]]]  # condition (None: else), body


@dataclass
class _Range:
    over: "_Field"
    body: list[Any]


@dataclass
class _Field:
    name: str
    of_root: bool


@dataclass
class _Call:
    function: str
    arguments: list[Any]


RESPONSE = _Field("Response", of_root=False)


class _Parser:
    def __init__(self, text: str) -> None:
        self._pieces = deque(_split(text))  # text and (action,), in turn

    def parse(self) -> list[Any]:
        nodes, end = self._block()
        if end:
            raise TemplateError(f"template: :1: unexpected {{{{{end}}}}}")
        return nodes

    def _block(self) -> tuple[list[Any], str]:
        """Nodes up to the `end` or `else …` that closes this block, and that word; "" at the end of the text."""
        nodes: list[Any] = []
        while self._pieces:
            piece = self._pieces.popleft()
            if isinstance(piece, str):
                nodes.append(piece)
                continue
            word, *rest = piece[0].split(maxsplit=1) or [""]
            if word in ("end", "else"):
                return nodes, piece[0]
            nodes.append(self._action(word, "".join(rest), piece[0]))
        return nodes, ""

    def _action(self, word: str, rest: str, action: str) -> Any:
        if word == "if":
            return self._if(rest)
        if word == "range":
            return self._range(rest)
        return _Show(_expression(action))

    def _range(self, over: str) -> _Range:
        if over not in (".Messages", "$.Messages"):
            raise TemplateError(f"range over {over} is not supported ({SUPPORTED})")
        body, end = self._block()
        if end != "end":
            raise TemplateError("template: :1: unexpected EOF" if not end else f"else in a range is not supported ({SUPPORTED})")
        return _Range(_Field("Messages", over.startswith("$")), body)

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
            otherwise = re.fullmatch(r"else(?:\s+if\s+(.+))?", end, re.DOTALL)
            if test is None or not otherwise:
                raise TemplateError(f"template: :1: unexpected {{{{{end}}}}}")
            test = _expression(otherwise[1]) if otherwise[1] else None


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
        before = before.lstrip(BLANKS) if trim else before
        before = before.rstrip(BLANKS) if left else before
        pieces += [before] if before else []
        action = inside[left : len(inside) - right].strip()
        if action.startswith("/*"):
            if not action.endswith("*/"):
                raise TemplateError(f"template: :{line}: unclosed comment")
        elif opened:
            pieces.append((action,))
        trim = right
    return pieces


def _expression(text: str) -> Any:
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', text)
    value = _pipeline(words)
    if words:
        raise TemplateError(f'"{text}" is not supported ({SUPPORTED})')
    return value


def _pipeline(words: list[str]) -> Any:
    if words and words[0] in LEAST:
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
        return _text(word)
    field = re.fullmatch(r"(\$?)\.(\w+)", word)
    if not field:
        raise TemplateError(f'"{word}" is not supported ({SUPPORTED})')
    return _Field(field[2], bool(field[1]))


def _text(literal: str) -> str:
    try:
        return str(json.loads(literal))  # its escapes are Go's, but for a few that no template needs
    except ValueError as error:
        raise TemplateError(f"{literal} is not supported as a string ({error})") from error


def _fields(nodes: list[Any], known: set[str]) -> Iterator[str]:
    """The names of all fields. Raises TemplateError for one that is not there where it stands."""
    for node in nodes:
        if isinstance(node, _Show):
            shown = list(_names(node.value, known))
            if "Messages" in shown:
                raise TemplateError(f"to print .Messages is not supported ({SUPPORTED})")
            yield from shown
        elif isinstance(node, _Range):
            yield from _names(node.over, known)
            yield from _fields(node.body, MESSAGE_FIELDS)
        elif isinstance(node, _If):
            for test, body in node.branches:
                yield from _names(test, known)
                yield from _fields(body, known)


def _names(expression: Any, known: set[str]) -> Iterator[str]:
    if isinstance(expression, _Call):
        function, count = expression.function, len(expression.arguments)
        if not LEAST[function] <= count <= MOST.get(function, count):
            raise TemplateError(f"wrong number of args for {function}: {count}")
        for argument in expression.arguments:
            yield from _names(argument, known)
    elif isinstance(expression, _Field):
        if expression.name not in (ROOT_FIELDS if expression.of_root else known):
            raise TemplateError(f'".{expression.name}" is not supported there ({SUPPORTED})')
        yield expression.name


def _up_to_response(nodes: list[Any]) -> tuple[list[Any], bool]:
    """What comes before the answer that is to be written, and whether its place was found."""
    kept: list[Any] = []
    for node in nodes:
        found = isinstance(node, _Show) and node.value == RESPONSE
        if isinstance(node, _If):
            branches: list[tuple[Any, list[Any]]] = []
            for test, body in node.branches:
                body, here = ([], True) if found else _up_to_response(body)
                found = found or here
                branches.append((test, body))
            node = _If(branches)
        kept.append(node)
        if found:
            return kept, True
    return kept, False


def _run(nodes: list[Any], dot: Message, root: Message) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif isinstance(node, _Show):
            value = _value(node.value, dot, root)
            text += str(value).lower() if isinstance(value, bool) else value
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
