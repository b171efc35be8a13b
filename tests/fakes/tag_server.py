"""The tags of a model server, in memory, for what moves aliases; it can end in the middle of a call, as a process does."""

from pathlib import Path
from types import TracebackType
from typing import Self


class Crash(BaseException):
    """The process is gone; nothing that it had in mind is done any more."""


class TagServer:
    """Digests by tag. `crash_before`, `crash_after`: so many changes from now the process that asks ends, before or after one.

    `in_memory`: tags of the models that are loaded.
    """

    url = "http://server"

    def __init__(self, tags: dict[str, str] | None = None) -> None:
        self.present = tags or {}
        self.changes: list[str] = []
        self.in_memory: list[str] = []
        self.crash_before: int | None = None
        self.crash_after: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def tags(self) -> dict[str, str]:
        return dict(self.present)

    def loaded(self) -> list[str]:
        return list(self.in_memory)

    def create(self, tag: str, digest: str) -> None:
        self.present[tag] = digest

    def copy(self, source: str, target: str) -> None:
        self._change(f"copy {source} {target}")
        self.present[target] = self.present[source]
        self._changed()

    def delete(self, tag: str) -> None:
        self._change(f"delete {tag}")
        del self.present[tag]
        self._changed()

    def _change(self, what: str) -> None:
        if self.crash_before == 0:
            raise Crash
        self.changes.append(what)

    def _changed(self) -> None:
        if self.crash_after == 0:
            raise Crash
        self.crash_before = None if self.crash_before is None else self.crash_before - 1
        self.crash_after = None if self.crash_after is None else self.crash_after - 1


def put_files(root: Path, folder: str) -> None:
    """Something that a version leaves on the disk."""
    (root / folder).mkdir(parents=True)
    (root / folder / "adapter.gguf").write_bytes(b"weights")
