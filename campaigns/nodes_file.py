"""nodes.toml, changed by commands. What a person wrote there stays as it is, comments and order too."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit
from pydantic import ValidationError
from tomlkit.exceptions import TOMLKitError

from config.errors import ConfigError
from config.files import write_atomic
from config.locks import alone
from config.settings import LOCAL, NodeSettings, Settings, require_name
from config.toml import ENCODING

EDITOR = "change it with an editor, or first into one table a node: [nodes.NAME]"


class Edit(NamedTuple):
    """What the file was (None: it was not there) and what it has become."""

    before: bytes | None
    after: bytes


def add_node(settings: Settings, name: str, node: NodeSettings) -> Edit:
    """Append a table with what is not a default. Raises ConfigError where the name is taken or cannot be one."""
    if require_name(name, "node") == LOCAL:
        raise ConfigError(f'"{LOCAL}" is this machine, always', hint="choose another name")

    def add(nodes: Any) -> None:
        if name in nodes:
            raise ConfigError(f'{settings.nodes_file} has a node "{name}"', hint=f"edit it, or first: hafs nodes remove {name}")
        table = tomlkit.table()
        table.update(node.model_dump(exclude_defaults=True))
        nodes[name] = table

    return _edit(settings, add)


def take_back(settings: Settings, name: str, added: Edit) -> None:
    """Make the file what it was before `add_node`; where it has been changed since, only the node goes."""
    path = settings.nodes_file
    with alone(_lock(path)):
        if path.read_bytes() == added.after:
            if added.before is None:
                path.unlink()
            else:
                write_atomic(path.resolve(), added.before)
            return
    remove_node(settings, name)


def described_node(**values: Any) -> NodeSettings:
    """A node as options of a command describe it. Raises ConfigError naming the option that is wrong."""
    try:
        return NodeSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{key} = {first['input']!r}: {first['msg']}", hint="no blanks, no quotes") from error


def change_node(settings: Settings, name: str, **values: str) -> None:
    """Set keys of a node. Raises ConfigError for a node that is not there."""
    settings.node(name)
    _edit(settings, lambda nodes: nodes[name].update(values))


def remove_node(settings: Settings, name: str) -> None:
    """Remove a table. Raises ConfigError for a node that is not there."""
    settings.node(name)
    _edit(settings, lambda nodes: nodes.__delitem__(name))


def _edit(settings: Settings, change: Callable[[Any], None]) -> Edit:
    """Read, change, check, replace the whole file; two commands at once take turns."""
    path = settings.nodes_file
    with alone(_lock(path)):
        settings.nodes()  # a file with a mistake is not written over: this names the line
        before = path.read_bytes() if path.exists() else None
        try:
            document = tomlkit.parse((before or b"").decode(ENCODING))  # from bytes: its line ends stay as they are
            if "nodes" not in document:
                document.append("nodes", tomlkit.table(is_super_table=True))
            change(document["nodes"])
        except (TOMLKitError, ValueError) as error:  # the second is said of tables in braces
            raise ConfigError(f"{path} is written in a way that cannot be changed here: {error}", hint=EDITOR) from error
        after = tomlkit.dumps(document).encode()
        _require_readable(path, after)
        write_atomic(path.resolve(), after)  # it may be a link to where a person keeps it
    return Edit(before, after)


def _require_readable(path: Path, text: bytes) -> None:
    """Not every mixture of dotted keys and tables can be added to. Raises ConfigError before anything is written."""
    try:
        tomllib.loads(text.decode())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is written in a way that cannot be changed here: {error}", hint=EDITOR) from error


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")
