"""The client of the hub, over a server that keeps to its wire; a fetch that is killed goes on where it stopped."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from config.contracts.base_name import HubFile
from config.errors import AuthFailed, ConfigError, DiskFull, HafsError, JobCancelled, ModelMissing, ProviderUnavailable
from config.locks import FileLock
from config.settings import load_settings
from tests.fakes.hub import COMMIT, Hub
from tests.fakes.waiting import wait_for
from trainer_node import hub as client
from trainer_node.base_model import resolve_base

REPO = "owner/Repo-GGUF"
BYTES = random.Random(0).randbytes(300_000)
NAMED = HubFile(REPO, "", "small/model.gguf")
PINNED = NAMED._replace(revision=COMMIT)
SHARDS = {f"model-0000{number}-of-00002.safetensors": random.Random(number).randbytes(50_000) for number in (1, 2)}
INDEX = json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(SHARDS)}}).encode()
FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": INDEX,
    **SHARDS,
}
NOT_NEEDED = {
    **{"README.md": b"#", "modeling_own.py": b"raise SystemExit", "pytorch_model.bin": b"x", "onnx/config.json": b"{}"},
    **{"consolidated.safetensors": b"x", "con.json": b"x", "..\\..\\evil.json": b"x", "C:evil.json": b"x"},
    **{"model.safetensors": b"the same weights once more"},
}
WHOLE = HubFile("owner/Whole", "", "")
FETCH = """
import sys
from pathlib import Path
from config.contracts.base_name import hub_file
from trainer_node import hub
print(hub.fetch(hub_file(sys.argv[1]), lambda done, total: None, lambda look: look(), offline=False))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(client, "MAX_WAIT_S", 0.01)
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    repos = {REPO: {"small/model.gguf": BYTES, "README.md": b"read me"}, "owner/Plain": {"model.safetensors": b"x"}}
    with Hub(
        {**repos, "owner/Whole": FOLDER | NOT_NEEDED, "owner/Pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"}}
    ) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub


def fetch(file: HubFile = PINNED, told: Callable[[int, int], None] = lambda done, total: None) -> Path:
    return client.fetch(file, told, straight, offline=False)


def straight(look: Callable[[], str]) -> None:
    assert look() == ""


def refused(kind: type[HafsError], file: HubFile = NAMED) -> HafsError:
    with pytest.raises(kind) as found:
        client.pin(file, offline=False)
    return found.value


def part(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--owner--Repo-GGUF" / "blobs" / f"{hashlib.sha256(BYTES).hexdigest()}.part"


def test_a_file_is_pinned_and_fetched_and_then_there_without_a_word(hub: Hub) -> None:
    progress: list[tuple[int, int]] = []
    assert client.pin(NAMED, offline=False) == PINNED
    path = fetch(told=lambda done, total: progress.append((done, total)))
    assert path.read_bytes() == BYTES and path.name == "model.gguf" and COMMIT in path.parts
    assert progress[0] == (0, len(BYTES)) and progress[-1] == (len(BYTES), len(BYTES)) and progress == sorted(progress)
    asked = len(hub.asked)
    for name in (NAMED, PINNED):
        assert client.cached(name) == path == resolve_base(str(name))
        assert client.pin(name, offline=True) == PINNED
    assert len(hub.asked) == asked, "no network for what is there"


def test_the_libraries_of_the_hub_find_it_too(hub: Hub) -> None:
    from huggingface_hub import hf_hub_download

    client.pin(NAMED, offline=False)
    path = fetch()
    found = hf_hub_download(REPO, NAMED.file, revision="main", cache_dir=constants.HF_HUB_CACHE, local_files_only=True)
    assert Path(found) == path


def test_a_cut_body_goes_on_where_it_ended(hub: Hub) -> None:
    hub.cuts = [100_000, 50_000, 1, 0, 0]
    assert fetch().read_bytes() == BYTES
    ranges = ["", "bytes=100000-", "bytes=150000-", "bytes=150001-", "bytes=150001-", "bytes=150001-"]
    assert [asked.range for asked in hub.bodies()] == ranges


def test_a_body_that_never_comes_ends_the_attempt_and_keeps_what_came(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = [7] + [0] * client.TRIES
    with pytest.raises(ProviderUnavailable):
        fetch()
    assert part(tmp_path).read_bytes() == BYTES[:7]
    assert fetch().read_bytes() == BYTES
    assert hub.bodies()[-1].range == "bytes=7-" and not part(tmp_path).exists()


def test_kill_9_in_the_middle_and_on_at_the_offset(hub: Hub, tmp_path: Path) -> None:
    hub.hold_after = 123_456
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    argv = [sys.executable, "-c", FETCH, str(PINNED)]
    child = subprocess.Popen(argv, env={**os.environ, **environment}, cwd=Path(__file__).parents[3])
    try:
        wait_for("bytes of the file", lambda: part(tmp_path).exists() and part(tmp_path).stat().st_size >= 100_000)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    came = part(tmp_path).stat().st_size
    assert came <= 123_456 and client.cached(PINNED) is None, "half a file has no name"
    hub.hold_after = None
    assert fetch().read_bytes() == BYTES
    assert hub.bodies()[-1].range == f"bytes={came}-"


def test_bytes_that_are_not_what_the_hub_said_get_no_name(hub: Hub, tmp_path: Path) -> None:
    hub.damaged = True
    with pytest.raises(ProviderUnavailable, match="not what the hub said"):
        fetch()
    assert not part(tmp_path).exists() and client.cached(PINNED) is None


def test_a_stop_in_the_middle_ends_it(hub: Hub, tmp_path: Path) -> None:
    def told(done: int, total: int) -> None:
        if done:
            raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        fetch(told=told)
    assert part(tmp_path).stat().st_size > 0, "the next attempt goes on with it"
    assert FileLock(part(tmp_path).with_suffix(".lock")).acquire()


def test_two_jobs_do_not_fetch_the_same_file_at_once(hub: Hub, tmp_path: Path) -> None:
    other = FileLock(part(tmp_path).with_suffix(".lock"))
    assert other.acquire()
    said: list[str] = []

    def wait(look: Callable[[], str]) -> None:
        said.append(look())
        other.release()
        assert look() == ""

    assert client.fetch(PINNED, lambda done, total: None, wait, offline=False).read_bytes() == BYTES
    assert "another job" in said[0]


def test_a_gated_repository_says_where_to_accept_and_where_the_token_belongs(hub: Hub) -> None:
    hub.gated.add(REPO)
    error = refused(AuthFailed)
    assert f"{hub.url}/{REPO}" in error.hint and str(load_settings().keys_file) in error.hint and "accept" in error.hint
    load_settings().keep_key("HF_TOKEN", "hf_not_let_in")
    assert "403" in str(refused(AuthFailed))
    load_settings().keep_key("HF_TOKEN", hub.let_in)
    assert client.pin(NAMED, offline=False) == PINNED
    assert fetch().read_bytes() == BYTES, "and the storage was sent no token"


def test_a_token_of_the_hubs_own_login_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    (tmp_path / "token").write_text(hub.let_in)
    assert client.pin(NAMED, offline=False) == PINNED


@pytest.mark.parametrize("token", ["hf_se\ncret", "hf_se cret", "hf_se\u2026cret"])
def test_a_token_that_is_none_is_not_repeated(token: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx would, in its complaint of the header."""
    monkeypatch.setenv("HF_TOKEN", token)
    error = refused(AuthFailed)
    assert "cret" not in str(error) + error.hint and "HF_TOKEN" in str(error) and not hub.asked
    monkeypatch.setenv("HF_TOKEN", f" {hub.let_in}\n")
    hub.gated.add(REPO)
    assert client.pin(NAMED, offline=False) == PINNED, "white space around it is nobody's intention"


def test_a_token_is_not_sent_to_where_a_name_without_a_scheme_leads(hub: Hub) -> None:
    load_settings().keep_key("HF_TOKEN", hub.let_in)
    hub.renamed["owner/Old"] = f"/localhost:{hub.port}/{REPO}"
    with pytest.raises(ProviderUnavailable, match="not an answer of the hub"):
        client.pin(NAMED._replace(repo="owner/Old"), offline=False)
    assert [asked.path for asked in hub.asked] == ["/owner/Old/resolve/main/small/model.gguf"]


def test_what_is_not_there_is_said_by_name(hub: Hub) -> None:
    assert "owner/nobody" in str(refused(ModelMissing, NAMED._replace(repo="owner/nobody")))
    assert "no revision v9" in str(refused(ModelMissing, NAMED._replace(revision="v9")))
    other = refused(ModelMissing, NAMED._replace(file="other.gguf"))
    assert "no file other.gguf" in str(other) and "small/model.gguf" in other.hint
    assert "write hf:owner/Plain" in refused(ModelMissing, NAMED._replace(repo="owner/Plain")).hint


def test_a_repository_that_was_renamed_is_followed(hub: Hub) -> None:
    hub.renamed["owner/Old"] = REPO
    assert client.pin(NAMED._replace(repo="owner/Old"), offline=False).revision == COMMIT


def test_a_hub_that_is_down_for_a_moment_is_asked_again(hub: Hub) -> None:
    hub.down = client.TRIES - 1
    assert client.pin(NAMED, offline=False) == PINNED
    hub.down = client.TRIES
    assert "503" in str(refused(ProviderUnavailable, NAMED._replace(revision="v1")))


def test_without_a_network_it_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "network" in refused(ProviderUnavailable).hint


def test_offline_nothing_is_asked(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="offline"):
        client.pin(NAMED, offline=True)
    with pytest.raises(ConfigError, match="offline"):
        client.fetch(PINNED, lambda done, total: None, straight, offline=True)
    with pytest.raises(ConfigError, match="not on this node"):
        resolve_base(str(NAMED))
    assert not hub.asked


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False), ("no", False)])
def test_what_says_offline_is_what_the_hub_reads(value: str, offline: bool) -> None:
    assert client.offline_wanted({"HF_HUB_OFFLINE": value}) is offline
    assert client.offline_wanted({"TRANSFORMERS_OFFLINE": value}) is offline


def test_a_disk_without_room_is_known_before_a_byte_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=client.SPARE_BYTES + 1000))
    with pytest.raises(DiskFull, match="GB are free"):
        fetch()
    assert not hub.bodies()


def test_an_old_file_of_git_itself_is_checked_as_git_names_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    assert client._digest(path, "c" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_whole_repository_comes_without_code_and_second_copies(hub: Hub, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    pinned = client.pin(WHOLE, offline=False)
    assert pinned == WHOLE._replace(revision=COMMIT) and str(pinned) == f"hf:owner/Whole@{COMMIT}"
    folder = fetch(pinned, told=lambda done, total: progress.append((done, total)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FOLDER
    total = sum(map(len, FOLDER.values()))
    assert progress == sorted(progress) and progress[-1] == (total, total)
    asked = len(hub.asked)
    for name in (WHOLE, pinned):
        assert client.cached(name) == folder == resolve_base(str(name))
        assert client.pin(name, offline=True) == pinned
    assert len(hub.asked) == asked, "no network for what is there"


def test_a_repository_that_was_cut_off_goes_on_and_counts_only_when_whole(hub: Hub) -> None:
    pinned = client.pin(WHOLE, offline=False)
    small = len(FOLDER) - len(SHARDS)
    hub.cuts = [10**6] * (small + 1) + [7] + [0] * client.TRIES
    with pytest.raises(ProviderUnavailable):
        fetch(pinned)
    assert client.cached(pinned) is None and client.cached(WHOLE) is None
    with pytest.raises(ConfigError, match="not on this node"):
        resolve_base(str(WHOLE))
    before = len(hub.bodies())
    folder = fetch(pinned)
    assert [asked.range for asked in hub.bodies()[before:]] == ["bytes=7-"], "what was there stays"
    assert {path.name for path in folder.iterdir()} == set(FOLDER)


def test_a_repository_without_safetensors_is_refused_with_what_it_has(hub: Hub) -> None:
    for repo, hint in (("owner/Pickled", "no safetensors"), (REPO, "small/model.gguf")):
        pinned = client.pin(WHOLE._replace(repo=repo), offline=False)
        with pytest.raises(ModelMissing, match="no whole model in safetensors") as missing:
            fetch(pinned)
        assert hint in missing.value.hint
    assert "owner/nobody" in str(refused(ModelMissing, WHOLE._replace(repo="owner/nobody")))
    hub.gated.add("owner/Whole")
    assert "accept" in refused(AuthFailed, WHOLE).hint


def test_a_repository_whose_index_names_what_it_has_not_is_refused(hub: Hub) -> None:
    for name, index in (
        ("lacking", INDEX.replace(b"00002-of", b"00003-of")),
        ("listing", b"[]"),
        ("numbers", b'{"weight_map": {"w": 1}}'),
        ("broken", b"{"),
    ):
        repo = hub.repos[f"owner/{name}"] = FOLDER | {"model.safetensors.index.json": index}
        pinned = client.pin(WHOLE._replace(repo=f"owner/{name}"), offline=False)
        with pytest.raises(ModelMissing, match="names files that it does not have") as missing:
            fetch(pinned)
        assert f"{hub.url}/owner/{name}" in missing.value.hint
        assert client.cached(pinned) is None
        repo["model.safetensors.index.json"] = INDEX


def test_shards_without_their_index_are_no_model(hub: Hub) -> None:
    hub.repos["owner/loose"] = {name: data for name, data in FOLDER.items() if "index" not in name}
    with pytest.raises(ModelMissing, match="or its parts with their model.safetensors.index.json"):
        fetch(client.pin(WHOLE._replace(repo="owner/loose"), offline=False))
    assert not hub.bodies()


def test_the_disk_has_to_have_room_for_all_of_a_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=client.SPARE_BYTES + 60_000))
    with pytest.raises(DiskFull, match="owner/Whole"):
        fetch(client.pin(WHOLE, offline=False))
    assert not hub.bodies()
