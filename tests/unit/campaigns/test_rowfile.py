"""A file of rows takes whole lines only, keeps what a person has done to it, and cuts off what a power cut has left."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from campaigns.rowfile import RowFile
from config.errors import StoreError
from tests.fakes.campaign_rows import append, files, store

LINE = b'{"id": "a"}\n'


@pytest.fixture
def file(tmp_path: Path) -> Iterator[RowFile]:
    made = RowFile(tmp_path / "rows.jsonl")
    yield made
    made.close()


@pytest.mark.parametrize("behind", [0, 10, 200_000, 3_000_000])
def test_zeros_are_found_however_much_came_behind_them(file: RowFile, behind: int) -> None:
    """A power cut keeps some pages of one large write and loses others."""
    written = LINE * (behind // len(LINE))
    file.path.write_bytes(LINE + b'{"id": ' + bytes(4096) + b'"}\n' + written)
    file.open()
    assert file.path.read_bytes() == LINE
    assert file.end == len(LINE)


@pytest.mark.parametrize("torn", [b'{"id', b"[1]", b'"text"', b'{"id": "b"}' + bytes(9), b"\xff", b" "])
def test_what_is_no_row_is_cut_off(file: RowFile, torn: bytes) -> None:
    file.path.write_bytes(LINE + torn)
    file.open()
    assert file.path.read_bytes() == LINE


@pytest.mark.parametrize("before", [b"", LINE, LINE * 20_000])
def test_a_last_row_without_its_newline_is_kept(file: RowFile, before: bytes) -> None:
    file.path.write_bytes(before + LINE.rstrip())
    file.open()
    file.append(LINE)
    assert file.path.read_bytes() == before + LINE + LINE


@pytest.mark.parametrize(
    "change", [lambda old: old[:-3], lambda old: b"", lambda old: old + b"more\n", lambda old: b"more" + old], ids=range(4)
)
def test_a_file_that_somebody_else_writes_is_left_as_it_is(file: RowFile, change: Callable[[bytes], bytes]) -> None:
    file.open()
    file.append(LINE)
    changed = change(file.path.read_bytes())
    file.path.write_bytes(changed)
    with pytest.raises(StoreError, match="was changed by somebody else while hafs was writing it"):
        file.append(LINE)
    assert file.path.read_bytes() == changed


def test_a_campaign_whose_file_is_edited_meanwhile_ends_and_says_so() -> None:
    with store() as opened:
        anyio.run(append, opened, 0)
        with files().samples.open("ab") as other:
            other.write(b"by hand\n")
        with pytest.raises(StoreError, match="samples.jsonl was changed by somebody else"):
            anyio.run(append, opened, 1)
    assert files().samples.read_bytes().endswith(b"by hand\n")


@pytest.mark.parametrize("name", ["samples.jsonl", "calls.jsonl"])
def test_an_editor_that_leaves_out_the_last_newline_costs_no_row(name: str) -> None:
    with store() as opened:
        for number in range(3):
            anyio.run(append, opened, number)
    path = files().path / name
    before = path.read_bytes()
    path.write_bytes(before.rstrip(b"\n"))
    with store() as opened:
        assert opened.tally.calls == opened.tally.counts.accepted["asm"] == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("copied", [0, -1])
def test_a_row_that_a_person_wrote_twice_is_counted_once(copied: int, indexed: bool) -> None:
    with store() as opened:
        for number in range(5):
            anyio.run(append, opened, number)
    lines = files().samples.read_bytes().splitlines(keepends=True)
    files().samples.write_bytes(b"".join([*lines, lines[copied], lines[copied]]))
    if not indexed:
        (files().path / "calls.index").unlink()
    for more in range(2):
        with store() as opened:
            assert opened.tally.counts.accepted["asm"] == 5 + more
            anyio.run(append, opened, 5 + more)
    ids = [json.loads(line)["task_id"] for line in files().calls.read_bytes().splitlines()]
    assert ids == [f"t{number}" for number in range(7)]


def edited_as(how: str, text: bytes) -> bytes:
    return {"crlf": text.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + text}[how]


@pytest.mark.parametrize("how", ["crlf", "bom"])
def test_files_that_a_windows_editor_has_saved_are_read_as_before(how: str) -> None:
    with store() as opened:
        for number in range(5):
            anyio.run(append, opened, number, "rejected" if number == 3 else "accepted")
    for path in (files().samples, files().rejected, files().calls):
        path.write_bytes(edited_as(how, path.read_bytes()))
    with store() as opened:
        assert (opened.tally.calls, opened.tally.counts.accepted["asm"]) == (5, 4)
        anyio.run(append, opened, 5)
    with store() as opened:
        assert (opened.tally.calls, opened.tally.counts.accepted["asm"]) == (6, 5)
