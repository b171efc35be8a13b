"""What `hafs models` does: over a link that loses answers, and what the screen says."""

import io
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from campaigns import loop, versions
from campaigns.cli import render, render_models
from campaigns.evaluation.report import BASE, TUNED, Evaluation, SetResult
from campaigns.evaluation.score import Answer
from campaigns.spec import LoopSpec
from campaigns.sync.remote import Node
from config.contracts import wire
from config.contracts.job import JobResult, JobSpec, JobState, JobView, PairScores, Perplexity, TrainJob
from config.contracts.wire import Ancestor, ExportState, ModelArgs, ModelsChanged, ModelsResult, ModelVersion
from config.errors import ConfigError, JobFailed, JobNotFound
from config.settings import Settings
from tests.fakes.in_process_node import InProcessNode
from tests.fakes.tag_server import TagServer
from trainer_node import aliases, registry
from trainer_node.jobdir import JobDir
from trainer_node.queue import Queue
from trainer_node.registry import ModelRecord
from trainer_node.rpc import Service

VERSION = ModelVersion(tag="hafs-coder:14b-v1", kind="sft", job="j", base="b", dataset_id="d" * 64, created_at=1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> TagServer:
    found = TagServer()
    monkeypatch.setattr(Service, "_server", lambda self: found)
    monkeypatch.setattr(aliases, "_tags_now", lambda *_: found.tags())
    return found


@pytest.fixture
def there(tmp_path: Path, server: TagServer) -> InProcessNode:
    """A node with three versions, each promoted when it was made."""
    node = InProcessNode(tmp_path / "node")
    for number, job in enumerate(("one", "two", "three"), 1):
        draft = ModelRecord(
            name="hafs-coder",
            version=0,
            size="14b",
            kind="sft",
            job=job,
            base="b",
            base_sha256="s",
            dataset_id="d",
            adapter_sha256="a",
        )
        record = registry.reserve(node.root, draft, []).model_copy(update={"passed": True, "digest": job})
        server.create(record.tag, job)
        registry.save(node.root, record)
        with Node("box", node.dial) as remote:
            remote.call(wire.PROMOTE, ModelArgs(model=f"hafs-coder:v{number}"))
    return node


def test_a_rollback_whose_answer_is_lost_goes_back_once(there: InProcessNode, server: TagServer) -> None:
    there.lose_answer_of = "rollback"
    with Node("box", there.dial) as node:
        changed = versions.rollback(node, "hafs-coder")
        assert there.asked.count("rollback") == 2
        assert [each.tag for each in changed.models] == ["hafs-coder:14b-v3", "hafs-coder:14b-v2"]
        assert server.present["hafs-coder:14b"] == server.present["hafs-coder:latest"] == "two"
        versions.rollback(node, "hafs-coder:14b")
        assert server.present["hafs-coder:latest"] == "one"
        with pytest.raises(JobNotFound, match="only version"):
            versions.rollback(node, "hafs-coder")
        with pytest.raises(JobNotFound):
            versions.rollback(node, "nobody")


@pytest.mark.parametrize("verb", ["delete", "prune"])
def test_a_deletion_whose_answer_is_lost_is_no_error(there: InProcessNode, server: TagServer, verb: str) -> None:
    there.lose_answer_of = verb
    with Node("box", there.dial) as node:
        if verb == "delete":
            node.call(wire.DELETE, ModelArgs(model="hafs-coder:v1"))
        else:
            node.call(wire.PRUNE, wire.PruneArgs(keep=2))
        listed = node.call(wire.MODELS, wire.Nothing())
    assert [each.tag for each in listed.models] == ["hafs-coder:14b-v2", "hafs-coder:14b-v3"]
    assert "hafs-coder:14b-v1" not in server.present


def test_the_node_keeps_what_a_job_in_the_queue_goes_on_from(there: InProcessNode) -> None:
    spec = JobSpec(kind="dpo", name="other", base="b.gguf", data=["d"], start="hafs-coder:v1")
    job = TrainJob(spec=spec, dataset_id="d", code_version="x", nonce="n")
    with closing(Queue(there.root)) as queue:
        queued, _ = queue.submit(job, lambda id_, made: JobDir(there.root / "jobs" / id_).write_job(made))
    with Node("box", there.dial) as node:
        with pytest.raises(JobFailed, match=f"job {queued.id} goes on from it"):
            node.call(wire.DELETE, ModelArgs(model="hafs-coder:v1"))
        changed = node.call(wire.PRUNE, wire.PruneArgs(keep=1))
    assert changed.removed == ["hafs-coder:14b-v2"]
    assert changed.notes == [f"hafs-coder:14b-v1 stays: job {queued.id} goes on from it"]


def test_after_a_crash_the_list_says_what_the_server_has_and_the_same_command_mends_it(
    there: InProcessNode, server: TagServer
) -> None:
    server.present |= {"hafs-coder:latest": "one", "hafs-coder:14b": "one"}
    with Node("box", there.dial) as node:
        first, _, third = node.call(wire.MODELS, wire.Nothing()).models
        assert first.aliases == ["hafs-coder:14b", "hafs-coder:latest"] and third.aliases == []
        assert "should name it" in third.note
        node.call(wire.PROMOTE, ModelArgs(model="hafs-coder:v3"))
        assert node.call(wire.MODELS, wire.Nothing()).models[2].alias == "hafs-coder:latest"


WORSE, BETTER, LIKE = (20, 2), (2, 20), (10, 11)


def evaluation(*sets: tuple[int, int], tuned: str = "hafs-coder:14b-v2") -> Evaluation:
    """Of sets of 20 questions, of which base and tuned answered so many rightly."""

    def answers(right: int) -> list[Answer]:
        return [Answer(f"item {n}", "Why?", "So.", n < right, "" if n < right else "wrong") for n in range(20)]

    found = [SetResult(f"set {n}", {BASE: answers(base), TUNED: answers(mine)}) for n, (base, mine) in enumerate(sets)]
    return Evaluation("base", tuned, "asm", found)


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        ([BETTER], ""),
        ([LIKE, BETTER], ""),
        ([LIKE], "no improvement over its base is shown"),
        ([BETTER, WORSE], "worse than its base on asm, set 1"),
        ([], "no improvement"),
    ],
)
def test_what_beats_its_base_and_is_nowhere_worse_may_take_its_place(sets: list[tuple[int, int]], reason: str) -> None:
    found = versions.objection([evaluation(*sets)])
    assert reason in found and bool(found) == bool(reason)


def test_a_name_means_a_version_that_passed_and_a_tag_any(there: InProcessNode, server: TagServer) -> None:
    with Node("box", there.dial) as node:
        assert versions.version(node, "Hafs-Coder").version.tag == "hafs-coder:14b-v3"
        for record in registry.records(there.root):
            registry.note(there.root, record, promotion=0)
        failed = record.model_copy(update={"version": 4, "job": "four", "passed": False, "fault": "never stops"})
        registry.save(there.root, failed)
        del server.present["hafs-coder:latest"], server.present["hafs-coder:14b"]
        assert versions.version(node, "hafs-coder").version.tag == "hafs-coder:14b-v3"
        assert versions.version(node, "hafs-coder:v4").version.fault == "never stops"
        with pytest.raises(JobNotFound):
            versions.version(node, "nobody")


class Said:
    """The screen of a loop that only has something to say."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def promoting(there: InProcessNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The end of a loop whose job made v2; what it says."""
    monkeypatch.setattr(loop, "connect", lambda settings, name: Node(name, there.dial))
    settings = Settings(home=tmp_path / "home")
    job = JobSpec(kind="sft", name="hafs-coder", base="b.gguf", data=["tiny"])
    spec = LoopSpec(name="tiny", campaign="c.toml", train="j.toml", node="box")
    campaign: Any = None
    made = loop.Loop(tmp_path / "loop.toml", spec, tmp_path / "c.toml", campaign, job)
    view = JobView(id="two", kind="sft", name="hafs-coder", state=JobState.SUCCEEDED, created_at=0, updated_at=0)
    view = view.model_copy(update={"result": JobResult(model="hafs-coder:14b-v2")})

    def promote(*sets: tuple[int, int]) -> str:
        screen: Any = Said()
        loop._promote(settings, made, view, [evaluation(*sets)], screen)
        return "\n".join(screen.lines)

    return promote


def test_the_loop_promotes_what_beats_its_base_and_says_so(promoting: Callable[..., str], server: TagServer) -> None:
    assert server.present["hafs-coder:latest"] == "three"
    assert promoting(BETTER) == "promoted, as it beats its base: hafs-coder:14b-v2 is hafs-coder:14b and hafs-coder:latest"
    assert server.present["hafs-coder:latest"] == server.present["hafs-coder:14b"] == "two"


def test_the_loop_says_why_no_alias_moved(promoting: Callable[..., str], server: TagServer) -> None:
    said = promoting(LIKE)
    assert "no alias was moved: no improvement" in said and "hafs models promote hafs-coder:14b-v2 --node box" in said
    assert server.present["hafs-coder:latest"] == "three"


def test_what_was_rolled_back_is_not_promoted_again_by_the_same_loop(
    promoting: Callable[..., str], there: InProcessNode, server: TagServer
) -> None:
    promoting(BETTER)
    with Node("box", there.dial) as node:
        versions.rollback(node, "hafs-coder")
    assert server.present["hafs-coder:latest"] == "three"
    assert "by an earlier run" in promoting(BETTER)
    assert server.present["hafs-coder:latest"] == "three"


def test_a_promotion_that_fails_is_tried_by_the_next_run(promoting: Callable[..., str], server: TagServer) -> None:
    lost = server.present.pop("hafs-coder:14b-v2")
    with pytest.raises(JobFailed, match="no longer has it"):
        promoting(BETTER)
    server.present["hafs-coder:14b-v2"] = lost
    assert "promoted" in promoting(BETTER)


def test_what_a_loop_measured_stands_in_the_comparison(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    first, second = ancestor(3.0), ancestor(2.5)
    second = second.model_copy(update={"version": VERSION.model_copy(update={"tag": "hafs-coder:14b-v2", "job": "two"})})
    job = JobView(id="two", kind="sft", name="hafs-coder", state=JobState.SUCCEEDED, created_at=0, updated_at=0)
    for loop_name, sets in (("tiny", [BETTER, LIKE]), ("broken", [BETTER])):
        versions.keep_benchmarks(settings, loop_name, job, [evaluation(*sets)])
    (settings.loops / "broken" / "benchmarks" / "two.json").write_text("{")
    versions.keep_benchmarks(settings, "other", job, [evaluation(WORSE, tuned="of another node:v2")])
    found = versions.benchmarks(settings, first), versions.benchmarks(settings, second)
    figures = {each.name: each[1:] for each in versions.compared(first, second, found)}
    assert figures["asm, set 0"] == ("", "20/20, 100 % [84, 100]")
    assert figures["asm, set 1"] == ("", "11/20, 55 % [34, 74]")
    assert figures["held-out perplexity"] == ("3.000", "2.500")


class Exporting:
    """A node on which an export takes three looks."""

    def __init__(self, last: ExportState) -> None:
        running = last.model_copy(update={"state": "running", "error": None})
        self.states = [running.model_copy(update={"step": "merging", "done": 1, "total": 9}), running, last]
        self.asked: list[wire.ExportArgs] = []
        self.name = "box"

    def call(self, verb: object, args: wire.ExportArgs, deadline_s: float) -> ExportState:
        assert verb is wire.EXPORT and deadline_s > args.wait_s > 0
        self.asked.append(args)
        return self.states.pop(0)


def test_an_export_is_started_once_and_followed() -> None:
    node: Any = Exporting(ExportState(tag="m:v1", state="done", files=["gguf/F16.gguf"]))
    told: list[tuple[str, int, int]] = []
    args = versions.export_args("m", "merged", "")
    state = versions.export(node, args, lambda *step: told.append(step))
    assert state.files == ["gguf/F16.gguf"] and told[0] == ("merging", 1, 9)
    assert [(each.model, each.start) for each in node.asked] == [("m", True), ("m:v1", False), ("m:v1", False)]


def test_an_export_that_failed_raises_what_the_node_says() -> None:
    error = wire.JobError(code="JobFailed", message="no room for that", hint="make some")
    failed: Any = Exporting(ExportState(tag="m:v1", state="failed", error=error))
    with pytest.raises(JobFailed, match="box: no room") as raised:
        versions.export(failed, versions.export_args("m", "hf", ""), print)
    assert raised.value.hint == "make some"


@pytest.mark.parametrize(
    ("route", "quantize", "known"),
    [
        ("merged", "Q9_9", "Q4_K_M"),
        ("gguf", "", "merged, adapter, hf"),
        ("adapter", "Q8_0", "--route merged"),
        ("hf", "Q8_0", "merged"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_what_can(route: str, quantize: str, known: str) -> None:
    with pytest.raises(ConfigError) as raised:
        versions.export_args("m", route, quantize)
    assert known in raised.value.hint


def ancestor(tuned: float, pairs: PairScores | None = None) -> Ancestor:
    return Ancestor(
        version=VERSION,
        name="hafs-coder",
        base_sha256="b",
        adapter_sha256="a",
        perplexity=Perplexity(rows=9, tokens=99, base=9, tuned=tuned),
        pairs=pairs,
        statistics={"steps": 12, "train_s": 3.14159},
    )


def test_two_versions_side_by_side_with_intervals() -> None:
    scores = PairScores(pairs=20, reward_accuracy=0.9, reward_margin=0.5, chosen_likelier=0.95, chosen_likelier_reference=0.5)
    figures = {each.name: each[1:] for each in versions.compared(ancestor(3.0), ancestor(2.5, scores))}
    assert figures["held-out perplexity"] == ("3.000", "2.500")
    assert figures["reward accuracy"] == ("", "90 % [70, 97]")
    assert figures["steps"] == ("12", "12") and figures["train s"] == ("3.14159", "3.14159")


def test_the_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    monkeypatch.setattr(render, "console", console)
    carries = VERSION.model_copy(
        update={"aliases": ["hafs-coder:14b", "hafs-coder:latest"], "route": "merged", "quantized": "Q8_0"}
    )
    lost = VERSION.model_copy(update={"tag": "hafs-coder:14b-v2", "note": "the server no longer has it"})
    failed = VERSION.model_copy(update={"tag": "hafs-coder:14b-v3", "fault": "hafs-coder:14b-v3 did not pass: empty"})
    render_models.models(ModelsResult(models=[carries, lost], failed=[failed]), False)
    render_models.changed(ModelsChanged(models=[carries, lost], removed=["a:v1"], notes=["b was left alone"]), False)
    render_models.changed(ModelsChanged(removed=["c:v1"]), False, dry_run=True)
    render_models.changed(ModelsChanged(), False)
    made = ExportState(tag="a:v1", state="done", files=["gguf/Q4_0.gguf"], quantized="Q4_0", quantizer="gguf 0.19", note="no K")
    render_models.exported(made, "box", False)
    render_models.compared("a:v1", "b:v1", [versions.Figure("rows", "1", "2")], False)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in (
        "hafs-coder:14b and hafs-coder:latest",
        "merged Q8_0",
        "hafs-coder:14b-v2: the server no longer has it",
        "kept for inspection: hafs-coder:14b-v3 did not pass: empty",
        "hafs-coder:14b-v2 carries no alias",
        "a:v1 is gone",
        "c:v1 would go",
        "nothing to delete",
        "b was left alone",
        "gguf/Q4_0.gguf, weights in Q4_0, made by gguf 0.19",
        "note: no K",
        "sync pull a:v1 --node box",
    ):
        assert part in text, part
    assert "those that were set last" in capsys.readouterr().err
    render_models.models(ModelsResult(models=[carries], checked=True), True)
    assert json.loads(capsys.readouterr().out)[0]["aliases"] == ["hafs-coder:14b", "hafs-coder:latest"]
