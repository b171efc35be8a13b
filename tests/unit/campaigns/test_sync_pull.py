"""Pull: whole and verified, or not there; and nothing a node says becomes a path outside the models."""

import hashlib
from pathlib import Path

import pytest

from campaigns.sync.pull import pull
from campaigns.sync.remote import Node
from config.contracts.wire import Artifact, ArtifactsResult, Reply, Request
from config.errors import NodeError, ProtocolError, TransferError
from config.settings import Settings
from tests.fakes.in_process_node import InProcessNode, InProcessTransport

ADAPTER = bytes(range(256)) * 400
CARD = b"{}"


class Shelf(InProcessTransport):
    """A connection whose list of artifacts is the test's: what a wrong or an evil node might say."""

    def __init__(self, node: InProcessNode, answer: dict[str, object]) -> None:
        super().__init__(node)
        self._answer = answer

    def exchange(self, line: bytes, deadline_s: float) -> bytes:
        if Request.model_validate_json(line).verb == "artifacts":
            return Reply(result=self._answer).model_dump_json().encode()
        return super().exchange(line, deadline_s)


@pytest.fixture
def there(tmp_path: Path) -> InProcessNode:
    return InProcessNode(tmp_path / "node")


def artifact(folder: Path, name: str, data: bytes) -> Artifact:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Artifact(name=name, path=str(path), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def answer(there: InProcessNode) -> dict[str, object]:
    files = [artifact(there.root, "adapter/adapter.safetensors", ADAPTER), artifact(there.root, "job.json", CARD)]
    return ArtifactsResult(tag="hafs-coder:v2", files=[*files, artifact(there.root, "empty.jsonl", b"")]).model_dump()


def ignore(done: int, total: int) -> None:
    """Progress nobody looks at."""


def test_a_model_is_pulled_under_its_name(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    seen: list[tuple[int, int]] = []
    node = Node("box", lambda: Shelf(there, answer))
    folder = pull(node, Settings(home=home), "hafs-coder", lambda done, all_: seen.append((done, all_)))
    assert folder == home / "models" / "hafs-coder" / "v2"
    assert (folder / "adapter" / "adapter.safetensors").read_bytes() == ADAPTER
    assert (folder / "job.json").read_bytes() == CARD and (folder / "empty.jsonl").read_bytes() == b""
    assert seen == sorted(seen) and seen[-1] == (len(ADAPTER) + 2, len(ADAPTER) + 2)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize("cut", [0, 1, 60_000])
def test_a_cut_download_goes_on_where_it_stopped(there: InProcessNode, answer: dict[str, object], home: Path, cut: int) -> None:
    there.cut_download_after = cut
    folder = pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert (folder / "adapter" / "adapter.safetensors").read_bytes() == ADAPTER


def test_what_is_there_and_right_is_not_fetched_again(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    folder = pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    before = (folder / "job.json").stat().st_ino
    (folder / "adapter" / "adapter.safetensors").write_bytes(b"spoiled" + ADAPTER[7:])
    pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert (folder / "job.json").stat().st_ino == before
    assert (folder / "adapter" / "adapter.safetensors").read_bytes() == ADAPTER


@pytest.mark.parametrize("left", [b"wrong", b"longer than the file" * 10**4])
def test_a_wrong_part_is_begun_again(there: InProcessNode, answer: dict[str, object], home: Path, left: bytes) -> None:
    part = home / "models" / "hafs-coder" / "v2" / "adapter" / "adapter.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    folder = pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert (folder / "adapter" / "adapter.safetensors").read_bytes() == ADAPTER


def test_a_file_that_is_never_right_is_not_there(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    (there.root / "adapter" / "adapter.safetensors").write_bytes(b"x" * len(ADAPTER))
    with pytest.raises(TransferError, match="not what the node says it is, twice"):
        pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert not list((home / "models").rglob("adapter.safetensors*"))


@pytest.mark.parametrize(
    "tag", ["../../x:v1", "x", "x:latest", "x:v1/../..", ":v1", "X:v1", "x:v1\n", "/etc:v1", "nul:v1", "con.x:v1", "x.:v1"]
)
def test_a_tag_that_is_no_name_is_refused(there: InProcessNode, answer: dict[str, object], home: Path, tag: str) -> None:
    with pytest.raises(ProtocolError, match="which is not NAME:vN"):
        pull(Node("box", lambda: Shelf(there, {**answer, "tag": tag})), Settings(home=home), "hafs-coder", ignore)
    assert not home.exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".ssh/x", "a//b", "a\\b", "C:x", "", "a/", "a b", "x\n"])
def test_a_file_that_is_no_name_is_refused(there: InProcessNode, answer: dict[str, object], home: Path, name: str) -> None:
    evil = {"name": name, "path": str(there.root / "job.json"), "bytes": 2, "sha256": hashlib.sha256(CARD).hexdigest()}
    with pytest.raises(NodeError):
        pull(Node("box", lambda: Shelf(there, {**answer, "files": [evil]})), Settings(home=home), "hafs-coder", ignore)
    assert not home.exists()


def test_a_link_that_leads_out_is_not_followed(
    there: InProcessNode, answer: dict[str, object], home: Path, tmp_path: Path
) -> None:
    folder = home / "models" / "hafs-coder" / "v2"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ProtocolError, match="leads out of"):
        pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert not list((tmp_path / "elsewhere").iterdir())
