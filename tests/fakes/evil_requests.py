"""Requests that a node must refuse: names that are paths, broken JSON, wrong types, too much. Seeded: a failure comes again."""

import json
import random
from collections.abc import Iterator
from typing import Any

NAMES = [
    *(
        "../x",
        "../../../../etc/passwd",
        "..",
        "/etc/passwd",
        "//x",
        "a/../../b",
        "a/b",
        "~/x",
        "./x",
        "-rf",
        " ",
        "a b",
        ".hidden",
    ),
    *(
        "..\\x",
        "C:\\x",
        "C:x",
        "d:/x",
        "\\\\host\\share\\x",
        "\\\\?\\C:\\x",
        "a\\b",
        "a:stream",
        "%TEMP%\\x",
        "$HOME",
        "`x`",
        "$(x)",
    ),
    *("hf:..", "hf:../x/y.gguf", "hf:a/b/../../c.gguf", "hf:a/CON/x.gguf", "hf:a/b@../x/y.gguf", "package:../x", "package:"),
    *("CON", "con", "NUL", "nul.txt", "aux.tar.gz", "PRN", "COM1", "com9.log", "LPT1", "name.", "name "),
    *("x" * 300, "x" * 100_000, "a\0b", "\0", "a\nb", "a\rb", "\u202egpj", "naïve", "\ud7ff", "a;b", "a|b", "a&b", "*", "?"),
]
SHA = "0" * 64
SEGMENT = {"sha256": SHA, "rows": 1, "bytes": 1, "packed_bytes": 1}
SPEC = {"kind": "sft", "name": "coder", "base": "package:nothing_here", "data": ["demo"]}
JOB = {"spec": SPEC, "dataset_id": SHA, "code_version": "0", "nonce": "1"}
MANIFEST = {"name": "demo", "campaigns": ["demo"], "segments": [SEGMENT]}
READ = {"job": "nobody", "attempt": 0, "offset": 0, "wait_s": 0}

# Each answers at once and writes nothing, even where a mutation leaves it whole.
HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("ping", {}),
    ("have", {"segments": [SEGMENT]}),
    ("commit_dataset", {"manifest": MANIFEST}),
    ("submit", {"job": JOB}),
    ("status", {"job": "nobody"}),
    ("cancel", {"job": "nobody"}),
    ("retry", {"job": "nobody"}),
    ("logs", READ),
    ("metrics", READ),
    ("artifacts", {"model": "nobody:v1"}),
]

# A place for a name in each verb that takes one: path into the arguments.
PLACES: list[tuple[str, dict[str, Any], list[str | int]]] = [
    ("have", {"segments": [SEGMENT]}, ["segments", 0, "sha256"]),
    ("receive", {"segment": SEGMENT, "offset": 0}, ["segment", "sha256"]),
    ("commit_dataset", {"manifest": MANIFEST}, ["manifest", "name"]),
    ("commit_dataset", {"manifest": MANIFEST}, ["manifest", "campaigns", 0]),
    ("commit_dataset", {"manifest": MANIFEST}, ["manifest", "segments", 0, "sha256"]),
    ("submit", {"job": JOB}, ["job", "dataset_id"]),
    ("submit", {"job": JOB}, ["job", "spec", "name"]),
    ("submit", {"job": JOB}, ["job", "spec", "data", 0]),
    ("submit", {"job": JOB}, ["job", "spec", "kind"]),
    ("status", {"job": ""}, ["job"]),
    ("cancel", {"job": ""}, ["job"]),
    ("retry", {"job": ""}, ["job"]),
    ("logs", READ, ["job"]),
    ("metrics", READ, ["job"]),
    ("artifacts", {"model": ""}, ["model"]),
    ("runtime", {"model": "", "gguf": ""}, ["gguf"]),
    ("runtime", {"model": "", "gguf": "/nowhere/base.gguf"}, ["model"]),
    ("submit", {"job": {**JOB, "after": ""}}, ["job", "after"]),
    ("submit", {"job": {**JOB, "spec": {**SPEC, "kind": "dpo", "start": ""}}}, ["job", "spec", "start"]),
    ("submit", {"job": JOB}, ["job", "spec", "base"]),
]
WRONG: list[Any] = [None, True, -1, 3.5, 10**30, "x", "", [], [[]], {}, {"a": 1}, [None] * 1000, "9" * 5000]


def evil_lines(seed: int, count: int) -> Iterator[tuple[bytes, bool]]:
    """Lines without their ends. True: it must be refused; False: it may happen to be a request that is harmless."""
    chance = random.Random(seed)
    makers = [_noise, _name, _name, _name, _type, _mutation, _mutation, _shape]
    for _ in range(count):
        line, refused = chance.choice(makers)(chance)
        yield line.replace(b"\n", b" "), refused


def _line(verb: Any, args: Any, **more: Any) -> bytes:
    return json.dumps({"version": 1, "verb": verb, "args": args, **more}).encode()


def _noise(chance: random.Random) -> tuple[bytes, bool]:
    return chance.randbytes(chance.randrange(200)), True


def _name(chance: random.Random) -> tuple[bytes, bool]:
    """A name that is none, whole or with something around it that makes it look better."""
    verb, args, place = chance.choice(PLACES)
    name = chance.choice(NAMES)
    if chance.random() < 0.3:
        name = chance.choice(["models/", "adapter/", "segments/", "x/../"]) + name
    return _line(verb, _with(args, place, name)), True


def _type(chance: random.Random) -> tuple[bytes, bool]:
    """Something of a wrong type, or a number that is none, in any place. What the field takes after all is harmless."""
    verb, args = chance.choice(HARMLESS)
    places = list(_places(args))
    return _line(verb, _with(args, chance.choice(places), chance.choice(WRONG)) if places else chance.choice(WRONG)), False


def _mutation(chance: random.Random) -> tuple[bytes, bool]:
    """A request with some bytes turned, doubled, missing or too many."""
    line = bytearray(_line(*chance.choice(HARMLESS)))
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(line))
        match chance.randrange(4):
            case 0:
                line[place] = chance.randrange(256)
            case 1:
                line[place:place] = line[: chance.randrange(40)]
            case 2:
                del line[place : place + chance.randrange(10)]
            case _:
                line[place:place] = chance.choice(
                    [b'"', b"{", b"}", b"\\", b"\x00", b"\xff", b"\\u0000", b"\\ud800", b"e999", b"NaN"]
                )
        line = line or bytearray(b"{")
    return bytes(line), False


def _shape(chance: random.Random) -> tuple[bytes, bool]:
    """JSON that is no request of this protocol."""
    deep = chance.randrange(1000, 20_000)
    shapes = [
        b"[" * deep,
        b'{"verb":' * deep,
        b"[" * deep + b"]" * deep,
        b'{"verb": "ping", "args": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
        _line(chance.choice(["teleport", "__init__", "answer", "close", "_route", "", "ping ", "PING", "x" * 5000]), {}),
        _line(chance.choice(WRONG), {}),
        _line("ping", chance.choice([value for value in WRONG if not isinstance(value, dict)])),
        _line("ping", {}, version=chance.choice([2, 99, "x", None, 10**30])),
        _line("receive", {"segment": SEGMENT, "offset": 0}, body_bytes=chance.choice([-1, 2**40, "x", None, 0.5])),
        _line("logs", {**READ, "wait_s": chance.choice([-1, 31, 1e9, "x"])}),
        _line("logs", {**READ, "offset": chance.choice([-1, "x", None])}),
        _line("events", {"after": chance.choice([-1, "x", None]), "wait_s": 0}),
        _line("doctor", {"time": chance.choice(["x", None, [], {}])}),
        b'{"verb": "status", "args": {"job": "\\ud800"}}',
        b'{"verb": "logs", "args": {"job": "x", "wait_s": NaN}}',
    ]
    return chance.choice(shapes), True


def _with(value: Any, place: list[str | int], new: Any) -> Any:
    """A copy of nested dicts and lists with another value in one place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _with(value[place[0]], place[1:], new)
    return copy


def _places(value: Any) -> Iterator[list[str | int]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield [key]
        yield from ([key, *place] for place in _places(inner))
