"""Pull: whole and verified, or not there; and nothing a node says becomes a path outside the models."""

import hashlib
from pathlib import Path

import pytest

from campaigns.sync.pull import ORIGIN, Origin, pull
from campaigns.sync.remote import Node
from config.contracts.wire import Artifact, ArtifactsResult, Reply, Request
from config.errors import NodeError, ProtocolError, StoreError, StoreHeld, TransferError
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
    files = [artifact(there.root, "adapter/adapter_model.safetensors", ADAPTER), artifact(there.root, "job.json", CARD)]
    return ArtifactsResult(tag="hafs-coder:v2", files=[*files, artifact(there.root, "empty.jsonl", b"")]).model_dump()


def ignore(done: int, total: int) -> None:
    """Progress nobody looks at."""


def test_a_model_is_pulled_under_its_name(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    seen: list[tuple[int, int]] = []
    node = Node("box", lambda: Shelf(there, answer))
    folder = pull(node, Settings(home=home), "hafs-coder", lambda done, all_: seen.append((done, all_)))
    assert folder == home / "models" / "hafs-coder" / "v2"
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == ADAPTER
    assert (folder / "job.json").read_bytes() == CARD and (folder / "empty.jsonl").read_bytes() == b""
    assert seen == sorted(seen) and seen[-1] == (len(ADAPTER) + 2, len(ADAPTER) + 2)
    assert not list(folder.rglob("*.part"))


def test_two_do_not_write_one_file(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    seen: list[StoreHeld] = []

    def again(done: int, total: int) -> None:
        with pytest.raises(StoreHeld, match="another hafs pulls hafs-coder:v2") as caught:
            pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder:v2", ignore)
        seen.append(caught.value)

    pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", again)
    pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert seen


@pytest.mark.parametrize("cut", [0, 1, 60_000])
def test_a_cut_download_goes_on_where_it_stopped(there: InProcessNode, answer: dict[str, object], home: Path, cut: int) -> None:
    there.cut_download_after = cut
    folder = pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == ADAPTER


def test_what_is_there_and_right_is_not_fetched_again(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    folder = pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    before = (folder / "job.json").stat().st_ino
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"spoiled" + ADAPTER[7:])
    pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert (folder / "job.json").stat().st_ino == before
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == ADAPTER


@pytest.mark.parametrize("left", [b"wrong", b"longer than the file" * 10**4])
def test_a_wrong_part_is_begun_again(there: InProcessNode, answer: dict[str, object], home: Path, left: bytes) -> None:
    part = home / "models" / "hafs-coder" / "v2" / "adapter" / "adapter_model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    folder = pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == ADAPTER


def test_a_file_that_is_never_right_is_not_there(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    (there.root / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * len(ADAPTER))
    with pytest.raises(TransferError, match="not what the node says it is, twice"):
        pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    assert not list((home / "models").rglob("adapter_model.safetensors*"))


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


def other(there: InProcessNode, answer: dict[str, object], **changed: object) -> dict[str, object]:
    """The same version name of another node: another adapter, or what else is `changed`."""
    files = [artifact(there.root / "other", "adapter/adapter_model.safetensors", b"other" + ADAPTER)]
    return {**answer, "files": [file.model_dump() for file in files], **changed}


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_name_of_another_node_does_not_take_the_place(
    there: InProcessNode, answer: dict[str, object], home: Path
) -> None:
    settings = Settings(home=home)
    folder = pull(Node("box", lambda: Shelf(there, {**answer, "job": "sft-0001-a"})), settings, "hafs-coder:v2", ignore)
    before = everything(folder)
    with pytest.raises(StoreError, match="holds hafs-coder:v2 of node box, job sft-0001-a: hafs-coder:v2 of node big") as caught:
        pull(Node("big", lambda: Shelf(there, other(there, answer))), settings, "hafs-coder:v2", ignore)
    assert "move that folder" in caught.value.hint and everything(folder) == before
    sized = other(there, answer, tag="hafs-coder:14b-v2")
    with pytest.raises(StoreError, match="hafs-coder:14b-v2 of node box is not put in its place"):
        pull(Node("box", lambda: Shelf(there, sized)), settings, "hafs-coder:14b-v2", ignore)
    with pytest.raises(StoreError, match="job sft-0009-z is not put"):  # same adapter, other figures
        pull(Node("big", lambda: Shelf(there, {**answer, "job": "sft-0009-z"})), settings, "hafs-coder:v2", ignore)
    folder.rename(folder.with_name("kept"))
    pull(Node("big", lambda: Shelf(there, other(there, answer))), settings, "hafs-coder:v2", ignore)
    assert everything(folder)["adapter/adapter_model.safetensors"] == b"other" + ADAPTER


def test_the_same_model_is_the_same_under_another_name_of_its_node(
    there: InProcessNode, answer: dict[str, object], home: Path
) -> None:
    folder = pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    before = everything(folder)
    renamed = {**answer, "job": "sft-0001-a"}  # and it says more by now
    assert pull(Node("gpu", lambda: Shelf(there, renamed)), Settings(home=home), "hafs-coder", ignore) == folder
    assert everything(folder) == before


def test_a_pull_that_was_cut_off_keeps_its_place(there: InProcessNode, answer: dict[str, object], home: Path) -> None:
    card = there.root / "job.json"
    card.write_bytes(b"[]")
    with pytest.raises(TransferError):
        pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)
    with pytest.raises(StoreError, match="of node box"):
        pull(Node("big", lambda: Shelf(there, other(there, answer))), Settings(home=home), "hafs-coder", ignore)
    card.write_bytes(CARD)
    pull(Node("box", lambda: Shelf(there, answer)), Settings(home=home), "hafs-coder", ignore)


@pytest.mark.parametrize("spoiled", [False, True], ids=["no note", "a note that cannot be read"])
def test_a_folder_of_an_earlier_hafs_is_known_by_its_adapter(
    there: InProcessNode, answer: dict[str, object], home: Path, spoiled: bool
) -> None:
    settings = Settings(home=home)
    folder = pull(Node("box", lambda: Shelf(there, answer)), settings, "hafs-coder", ignore)
    note = folder / ORIGIN
    note.write_bytes(b"{") if spoiled else note.unlink()
    with pytest.raises(StoreError, match="holds what may be another model: hafs-coder:v2 of node big is not put in its place"):
        pull(Node("big", lambda: Shelf(there, other(there, answer))), settings, "hafs-coder", ignore)
    pull(Node("box", lambda: Shelf(there, answer)), settings, "hafs-coder", ignore)
    assert Origin.model_validate_json(note.read_bytes()).node == "box"
    note.unlink()
    (folder / "adapter" / "adapter_model.safetensors").unlink()  # what is left may be anybody's
    with pytest.raises(StoreError, match="holds what may be another model"):
        pull(Node("box", lambda: Shelf(there, answer)), settings, "hafs-coder", ignore)
