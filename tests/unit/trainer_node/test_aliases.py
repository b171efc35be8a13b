"""Aliases: they name what was promoted, whatever crashed in between; what hafs did not make is never touched."""

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from config.contracts.job import JobSpec, JobState, JobView, TrainJob
from config.errors import JobFailed, JobNotFound, ProviderUnavailable
from config.locks import FileLock
from tests.fakes.tag_server import Crash, TagServer, put_files
from trainer_node import aliases, registry
from trainer_node.jobdir import JobDir
from trainer_node.registry import ModelRecord
from trainer_node.runtime.launch import RuntimeInfo

NAME, OTHER = "hafs-coder", "theirs"


def made(root: Path, server: TagServer, job: str, size: str = "", name: str = NAME, digest: str = "") -> ModelRecord:
    """A version that passed the gate and was not promoted."""
    draft = ModelRecord(
        name=name, version=0, size=size, kind="sft", job=job, base="b", base_sha256="s", dataset_id="d", adapter_sha256="a"
    )
    record = registry.reserve(root, draft, server.tags())
    server.create(record.tag, digest or f"sha:{job}")
    record = record.model_copy(update={"passed": True, "digest": digest or f"sha:{job}"})
    registry.save(root, record)
    put_files(root, record.folder)
    return record


def three(root: Path, server: TagServer, size: str = "") -> Any:
    """Three versions, each promoted when it was made."""
    for job in ("one", "two", "three"):
        aliases.promote(api(server), root, made(root, server, job, size).tag)
    return api(server)


def api(server: TagServer) -> Any:
    return server


def a_job(root: Path, id_: str, start: str = "") -> JobView:
    """One that has not ended; with `start` it is a dpo job."""
    spec = JobSpec(kind="dpo" if start else "sft", name="tuned", base="b.gguf", data=["d"], start=start)
    JobDir(root / "jobs" / id_).write_job(TrainJob(spec=spec, dataset_id="d", code_version="x", nonce="n"))
    return JobView(id=id_, kind=spec.kind, name="tuned", state=JobState.REGISTERING, created_at=0, updated_at=0)


@pytest.fixture
def server() -> TagServer:
    return TagServer()


def test_both_aliases_move_with_a_promotion(tmp_path: Path, server: TagServer) -> None:
    changed = aliases.promote(api(server), tmp_path, made(tmp_path, server, "one", "14b").tag)
    assert server.present == {
        "hafs-coder:14b-v1": "sha:one",
        "hafs-coder:14b": "sha:one",
        "hafs-coder:latest": "sha:one",
    }
    assert changed.models[0].aliases == ["hafs-coder:14b", "hafs-coder:latest"] and not changed.notes
    before = list(server.changes)
    aliases.promote(api(server), tmp_path, NAME)
    assert server.changes == before, "asked again it changes nothing"


def test_a_rollback_goes_back_one_version_and_the_next_one_further(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)
    aliases.rollback(api(server), tmp_path, NAME)
    assert server.present["hafs-coder:latest"] == "sha:two"
    aliases.rollback(api(server), tmp_path, "hafs-coder:latest")
    assert server.present["hafs-coder:latest"] == "sha:one"
    with pytest.raises(JobNotFound, match="only version"):
        aliases.rollback(api(server), tmp_path, NAME)
    assert server.present["hafs-coder:latest"] == "sha:one"


def test_a_rollback_that_is_asked_twice_goes_back_once(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)
    for _ in range(2):
        changed = aliases.rollback(api(server), tmp_path, NAME, leave="hafs-coder:v3")
        assert [each.tag for each in changed.models] == ["hafs-coder:v3", "hafs-coder:v2"]
    assert server.present["hafs-coder:latest"] == "sha:two"


def test_what_was_rolled_back_is_not_gone_back_to(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)
    aliases.rollback(api(server), tmp_path, NAME)
    aliases.promote(api(server), tmp_path, made(tmp_path, server, "four").tag)
    aliases.rollback(api(server), tmp_path, NAME)
    assert server.present["hafs-coder:latest"] == "sha:two"
    aliases.promote(api(server), tmp_path, "hafs-coder:v3")
    assert server.present["hafs-coder:latest"] == "sha:three", "but by name it can be promoted again"


def test_a_version_that_was_never_promoted_is_not_gone_back_to(tmp_path: Path, server: TagServer) -> None:
    aliases.promote(api(server), tmp_path, made(tmp_path, server, "one").tag)
    made(tmp_path, server, "two")
    aliases.promote(api(server), tmp_path, made(tmp_path, server, "three").tag)
    aliases.rollback(api(server), tmp_path, NAME)
    assert server.present["hafs-coder:latest"] == "sha:one"


def test_sizes_have_an_alias_each(tmp_path: Path, server: TagServer) -> None:
    for job, size in (("one", "14b"), ("two", "7b")):
        aliases.promote(api(server), tmp_path, made(tmp_path, server, job, size).tag)
    assert (server.present["hafs-coder:14b"], server.present["hafs-coder:latest"]) == ("sha:one", "sha:two")
    changed = aliases.rollback(api(server), tmp_path, NAME)
    assert server.present["hafs-coder:latest"] == "sha:one"
    assert "hafs-coder:7b" not in server.present and "hafs-coder:7b is gone" in changed.notes[0]


@pytest.mark.parametrize("theirs", ["hafs-coder:latest", "Hafs-Coder:latest", "hafs-coder:Latest"])
def test_an_alias_that_hafs_did_not_make_is_never_moved(tmp_path: Path, server: TagServer, theirs: str) -> None:
    server.create(theirs, "someone else's")
    for job in ("one", "two"):
        changed = aliases.promote(api(server), tmp_path, made(tmp_path, server, job, "14b").tag)
        assert "not made by hafs" in changed.notes[0]
        assert changed.models[0].alias == ""
    assert server.present[theirs] == "someone else's"
    assert server.present["hafs-coder:14b"] == "sha:two", "the other one is ours"
    aliases.rollback(api(server), tmp_path, NAME)
    assert (server.present[theirs], server.present["hafs-coder:14b"]) == ("someone else's", "sha:one")


def test_a_rollback_of_one_size_leaves_the_others(tmp_path: Path, server: TagServer) -> None:
    for job, size in (("one", "14b"), ("two", "14b"), ("three", "7b")):
        aliases.promote(api(server), tmp_path, made(tmp_path, server, job, size).tag)
    for _ in range(2):
        changed = aliases.rollback(api(server), tmp_path, "hafs-coder:14b", leave="hafs-coder:14b-v2")
        assert [each.tag for each in changed.models] == ["hafs-coder:14b-v2", "hafs-coder:14b-v1"]
    assert (server.present["hafs-coder:14b"], server.present["hafs-coder:latest"]) == ("sha:one", "sha:three")
    for alias in ("hafs-coder:14b", "hafs-coder:7b"):
        with pytest.raises(JobNotFound, match=f"only version that {alias}"):
            aliases.rollback(api(server), tmp_path, alias)
    assert server.present["hafs-coder:7b"] == "sha:three"


def test_no_alias_is_made_of_a_tag_that_is_no_longer_ours(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)
    server.create("hafs-coder:v2", "someone else's")
    with pytest.raises(JobFailed, match="not what hafs made"):
        aliases.promote(api(server), tmp_path, "hafs-coder:v2")
    changed = aliases.rollback(api(server), tmp_path, NAME)
    assert "cannot name hafs-coder:v2: what the server has" in changed.notes[0]
    assert server.present["hafs-coder:latest"] == "sha:three"


def test_delete_takes_server_files_and_listing_but_not_what_carries_an_alias(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)
    with pytest.raises(JobFailed, match=r"hafs-coder:latest names"):
        aliases.delete(api(server), tmp_path, "hafs-coder:v3")
    for _ in range(2):  # a lost answer: asked again
        assert aliases.delete(api(server), tmp_path, "hafs-coder:v2").removed == ["hafs-coder:v2"]
    assert "hafs-coder:v2" not in server.present
    assert not (tmp_path / "models/hafs-coder/v2").exists()
    assert [each.tag for each in registry.versions(tmp_path)] == ["hafs-coder:v1", "hafs-coder:v3"]
    for model in ("hafs-coder", "hafs-coder:latest", "hafs-coder:v9"):
        with pytest.raises(JobNotFound):
            aliases.delete(api(server), tmp_path, model)
    aliases.rollback(api(server), tmp_path, NAME)
    assert server.present["hafs-coder:latest"] == "sha:one", "a deleted version is not gone back to"


def test_a_tag_that_is_no_longer_ours_is_not_deleted(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)
    server.create("hafs-coder:v1", "someone else's")
    assert "left alone" in aliases.delete(api(server), tmp_path, "hafs-coder:v1").notes[0]
    assert server.present["hafs-coder:v1"] == "someone else's"


def test_prune_keeps_the_newest_and_what_an_alias_names(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)
    aliases.promote(api(server), tmp_path, "hafs-coder:v1")
    made(tmp_path, server, "x", name="other")
    assert aliases.prune(api(server), tmp_path, 1, dry_run=True).removed == ["hafs-coder:v2"]
    assert "hafs-coder:v2" in server.present
    assert aliases.prune(api(server), tmp_path, 1, NAME).removed == ["hafs-coder:v2"]
    assert sorted(each.tag for each in registry.versions(tmp_path)) == ["hafs-coder:v1", "hafs-coder:v3", "other:v1"]
    with pytest.raises(JobNotFound):
        aliases.prune(api(server), tmp_path, 1, "nobody")


def test_a_version_that_did_not_pass_pushes_out_no_good_one(tmp_path: Path, server: TagServer) -> None:
    for job in ("one", "two", "three", "four"):
        record = made(tmp_path, server, job)
        if job in ("three", "four"):
            registry.note(tmp_path, record, passed=False, fault="never stops")
    assert aliases.prune(api(server), tmp_path, 1).removed == ["hafs-coder:v1", "hafs-coder:v3"]


def test_what_a_job_makes_or_goes_on_from_is_not_deleted(tmp_path: Path, server: TagServer) -> None:
    for job in ("one", "two", "three", "four", "five"):
        record = made(tmp_path, server, job)
    registry.note(tmp_path, registry.resolve(tmp_path, "hafs-coder:v2"), passed=False)  # its gate is asked now
    registry.pin_start(tmp_path / "jobs" / "dpo-1", "hafs-coder:v3")  # what the name meant when it began
    owed = [a_job(tmp_path, "two"), a_job(tmp_path, "dpo-1", NAME), a_job(tmp_path, "dpo-2", "hafs-coder:v4")]
    for number, why in ((2, "job two makes it"), (3, "job dpo-1 goes on from it"), (4, "job dpo-2 goes on from it")):
        with pytest.raises(JobFailed, match=why):
            aliases.delete(api(server), tmp_path, f"hafs-coder:v{number}", owed)
    pruned = aliases.prune(api(server), tmp_path, 1, owed=owed)
    assert pruned.removed == ["hafs-coder:v1"] and len(pruned.notes) == 2, "the one without a gate is the newest of its kind"
    assert aliases.prune(api(server), tmp_path, 1).removed == ["hafs-coder:v3", "hafs-coder:v4"]
    assert record.tag in server.present


def test_a_version_of_which_another_form_is_made_is_not_deleted(tmp_path: Path, server: TagServer) -> None:
    record = made(tmp_path, server, "one")
    lock = FileLock(tmp_path / record.folder / ".exports" / "hf.lock")
    assert lock.acquire()
    with pytest.raises(JobFailed, match="another form"):
        aliases.delete(api(server), tmp_path, record.tag)
    lock.release()
    assert aliases.delete(api(server), tmp_path, record.tag).removed == [record.tag]


def test_prune_leaves_what_somebody_talks_to(tmp_path: Path, server: TagServer) -> None:
    for job in ("one", "two", "three"):
        made(tmp_path, server, job)
    server.in_memory = ["Hafs-Coder:v1"]
    for dry_run in (True, False):
        pruned = aliases.prune(api(server), tmp_path, 1, dry_run=dry_run)
        assert pruned.removed == ["hafs-coder:v2"]
        assert pruned.notes == ["hafs-coder:v1 stays: it is loaded at the model server"]
    assert "hafs-coder:v1" in server.present


def test_a_version_that_was_deleted_meanwhile_does_not_come_back(tmp_path: Path, server: TagServer) -> None:
    record = made(tmp_path, server, "one")
    aliases.delete(api(server), tmp_path, record.tag)
    assert registry.note(tmp_path, record, passed=True).deleted
    assert registry.versions(tmp_path) == []


@pytest.mark.parametrize("answers", [None, RuntimeInfo("http://own", embedded=True, version="1", started=False)])
def test_an_ollama_that_is_away_is_not_replaced(
    tmp_path: Path, server: TagServer, monkeypatch: pytest.MonkeyPatch, answers: RuntimeInfo | None
) -> None:
    """The embedded runtime has none of its models: they would all be called lost."""
    monkeypatch.delenv("HAFS_RUNTIME", raising=False)
    own = RuntimeInfo("http://own", embedded=True, version="1", started=True)
    monkeypatch.setattr(aliases, "find_server", lambda root: answers)
    monkeypatch.setattr(aliases, "ensure_runtime", lambda root: own)
    record = made(tmp_path, server, "one")
    assert aliases.server_of(tmp_path, ollama=aliases.at_ollama(registry.records(tmp_path))).embedded, "nobody noted where"
    registry.note(tmp_path, record, server=registry.OLLAMA)
    assert aliases.at_ollama(registry.records(tmp_path))
    with pytest.raises(ProviderUnavailable, match="where the models of this node are"):
        aliases.server_of(tmp_path, ollama=True)
    listed = aliases.listing(tmp_path)
    assert (listed.checked, listed.models[0].note) == (False, "")
    monkeypatch.setenv("HAFS_RUNTIME", "embedded")
    assert aliases.server_of(tmp_path, ollama=True).embedded, "a person has said so"


def test_laptops_that_move_it_at_once_leave_the_alias_on_what_stands(tmp_path: Path, server: TagServer) -> None:
    three(tmp_path, server)

    def move(number: int) -> None:
        if number % 2:
            aliases.rollback(api(server), tmp_path, NAME, leave="hafs-coder:v3")
        else:
            aliases.promote(api(server), tmp_path, f"hafs-coder:v{number % 3 + 1}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(move, range(12)))
    stands = registry.standing(registry.records(tmp_path))["hafs-coder:latest"]
    assert server.present["hafs-coder:latest"] == stands.digest and stands.aliases == ["hafs-coder:latest"]
    numbers = [each.promotion for each in registry.records(tmp_path) if each.promotion]
    assert len(numbers) == len(set(numbers)), "no two promotions have one number"


def test_two_versions_with_the_same_weights_are_told_apart(tmp_path: Path, server: TagServer) -> None:
    for job in ("one", "two"):
        aliases.promote(api(server), tmp_path, made(tmp_path, server, job, digest="same").tag)
    assert [each.alias for each in registry.versions(tmp_path)] == ["", "hafs-coder:latest"]
    aliases.rollback(api(server), tmp_path, NAME)
    assert [each.alias for each in registry.versions(tmp_path)] == ["hafs-coder:latest", ""]


def test_a_version_that_the_server_lost_is_not_promoted(tmp_path: Path, server: TagServer) -> None:
    record = made(tmp_path, server, "one")
    del server.present[record.tag]
    with pytest.raises(JobFailed, match="no longer has it"):
        aliases.promote(api(server), tmp_path, record.tag)
    with pytest.raises(JobNotFound):
        aliases.promote(api(server), tmp_path, "hafs-coder:v2")


def test_a_listing_tells_what_the_server_has(tmp_path: Path, server: TagServer, monkeypatch: pytest.MonkeyPatch) -> None:
    three(tmp_path, server)
    monkeypatch.setattr(aliases, "_tags_now", lambda *_: server.tags())
    server.present["hafs-coder:latest"] = "someone else's"
    assert aliases.listing(tmp_path).models[2].note == "hafs-coder:latest at the server was not made by hafs and is left alone"
    server.present["hafs-coder:latest"] = "sha:one"  # a crash, or a person with `ollama cp`
    del server.present["hafs-coder:v2"]
    listed = aliases.listing(tmp_path)
    assert [each.alias for each in listed.models] == ["hafs-coder:latest", "", ""] and listed.checked
    assert listed.models[1].note == "the server no longer has it"
    assert "hafs models promote hafs-coder:v3" in listed.models[2].note
    monkeypatch.setattr(aliases, "_tags_now", lambda *_: None)
    assert [each.alias for each in aliases.listing(tmp_path).models] == ["", "", "hafs-coder:latest"]
    assert not aliases.listing(tmp_path).checked


def test_what_failed_the_gate_is_listed_apart(tmp_path: Path, server: TagServer) -> None:
    record = made(tmp_path, server, "one")
    registry.save(tmp_path, record.model_copy(update={"passed": False, "fault": "never stops"}))
    listed = aliases.listing(tmp_path)
    assert (listed.models, [each.fault for each in listed.failed]) == ([], ["never stops"])
    assert aliases.delete(api(server), tmp_path, record.tag).removed == [record.tag]
    assert aliases.listing(tmp_path).failed == []


@pytest.mark.parametrize("seed", range(int(os.environ.get("HAFS_KILLS", "10"))))
def test_any_order_of_commands_and_crashes_ends_where_the_same_commands_end_without(tmp_path: Path, seed: int) -> None:
    """Each command may be cut off between registry and server and is then given again: nothing tells that from a calm run."""
    calm = played(tmp_path / "calm", seed, crashes=False)
    rough = played(tmp_path / "rough", seed, crashes=True)
    assert rough == calm


def played(root: Path, seed: int, *, crashes: bool) -> tuple[dict[str, str], list[Any]]:
    """The tags and the versions after twenty seeded commands. A foreign alias stays whatever it is."""
    root.mkdir()
    draw, fate = random.Random(seed), random.Random(seed + 1000)
    server = TagServer({f"{OTHER}:latest": "foreign"})
    for number in range(20):
        name, size, pick = draw.choice((NAME, NAME, OTHER)), draw.choice(("", "7b", "14b")), draw.random()
        what = draw.choice(("make", "make", "promote", "back", "delete", "prune"))
        if what == "make":
            chosen, what = made(root, server, f"job{number}", size, name).tag, "promote"
        else:
            known = [each for each in registry.records(root) if each.name == name and not each.deleted]
            chosen = known[int(pick * len(known))].tag if known else "nothing:v1"
        given(server, command(root, server, what, name, chosen), fate if crashes else None)
        assert server.present[f"{OTHER}:latest"] == "foreign"
    records = [(each.tag, each.aliases, each.promotion, each.deleted) for each in registry.records(root)]
    files = [path.as_posix().partition("/models/")[2] for path in root.glob("models/*/*")]
    return server.present, [*sorted(records), *sorted(files)]


def command(root: Path, server: TagServer, what: str, name: str, chosen: str) -> Callable[[], object]:
    """A command as the laptop sends it, to be given once or twice."""
    stands = registry.standing(registry.records(root)).get(f"{name}:latest")
    leave = stands.tag if stands else ""
    return {
        "promote": lambda: aliases.promote(api(server), root, chosen),
        "delete": lambda: aliases.delete(api(server), root, chosen),
        "back": lambda: aliases.rollback(api(server), root, name, leave),
        "prune": lambda: aliases.prune(api(server), root, 2, name),
    }[what]


def given(server: TagServer, told: Callable[[], object], fate: random.Random | None) -> None:
    """Give a command; where it crashes, again. What it refuses it refuses both times."""
    if fate is not None:
        setattr(server, fate.choice(("crash_before", "crash_after")), fate.randrange(3))
    try:
        told()
    except Crash:
        server.crash_before = server.crash_after = None
        told()
    except (JobNotFound, JobFailed):
        pass
    server.crash_before = server.crash_after = None
