"""The documents name what exists."""

import re
from pathlib import Path

import pytest

DOCUMENTS = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_file_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    named = re.findall(r"`((?:config|agents|campaigns|trainer_node|tests|docs)/[\w./-]+)`", text)
    named += [str(document.parent / link) for link in re.findall(r"\]\(((?!http)[^)#]+)\)", text)]
    assert [name for name in named if not Path(name).exists()] == []
