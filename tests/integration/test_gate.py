"""The smoke gate at a real model server: each way to be wrong stops it, the aliases stay where they were, and it says why."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from config.contracts.job import ExportOptions, JobSpec, Perplexity, TrainJob
from config.contracts.sample import Message
from config.contracts.wire import ArtifactsArgs
from config.errors import GateFailed, JobCancelled, JobNotFound, ProviderUnavailable
from tests.fakes.chain_model import EMPTY, ENDLESS, GOOD, LEAKING, write_chain
from tests.fakes.model_files import ODD_TEMPLATE
from tests.fakes.own_runtime import own_runtime
from tests.fakes.tag_server import Crash
from trainer_node import aliases, registry
from trainer_node.export.gate import require_gate
from trainer_node.export.probes import Probe, Probes
from trainer_node.export.register import Exported, promoted, register
from trainer_node.jobdir import JobDir
from trainer_node.ollama import OllamaApi, Progress
from trainer_node.registry import ModelRecord
from trainer_node.rpc import Service
from trainer_node.runtime.launch import ensure_runtime
from trainer_node.train.base import load_tokenizer, read_base, special_tokens
from trainer_node.train.encode import render_prompt, token_ids

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

SYSTEM = "Be brief."
ASKED = [Message(role="system", content=SYSTEM), Message(role="user", content="Why?")]
BETTER = Perplexity(rows=2, tokens=9, base=9.0, tuned=3.0)
WORSE = Perplexity(rows=2, tokens=9, base=3.0, tuned=3.01)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A node with a model server, which is ended with it."""
    path = tmp_path_factory.mktemp("node")
    with own_runtime(path):
        yield path


@pytest.fixture(scope="module")
def api(root: Path) -> Iterator[OllamaApi]:
    with OllamaApi(ensure_runtime(root).url) as client:
        yield client


@pytest.fixture(scope="module")
def probes(root: Path) -> Probes:
    """What was noted of a model that was trained to say "Because."."""
    tokenizer = load_tokenizer(read_base(write_chain(root / "base.gguf", GOOD)))
    count = len(token_ids(tokenizer, render_prompt(tokenizer, ASKED)))
    probe = Probe(messages=ASKED, prompt_tokens=count, greedy="Because.", ended=True, first=["Because", "", "So"])
    return Probes(probes=[probe, probe], special=special_tokens(tokenizer))


class Node:
    """One name on a node, of which versions are registered one after the other."""

    def __init__(self, root: Path, api: OllamaApi, probes: Probes, name: str) -> None:
        self.root, self.api, self.probes, self.name = root, api, probes, name
        self.jobs = 0

    def register(
        self,
        chain: dict[int, int],
        *,
        figures: Perplexity = BETTER,
        greedy: str = "",
        promote: str = "gate",
        uploading: Progress = lambda sent, total: None,
        **model: Any,
    ) -> tuple[ModelRecord, str]:
        """As the pipeline does it with a merged GGUF; the record and what there is to say."""
        self.jobs += 1
        job_dir = JobDir(self.root / "jobs" / f"{self.name}-{self.jobs}")
        options = ExportOptions.model_validate({"route": "merged", "promote": promote})
        spec = JobSpec(kind="sft", name=self.name, base="b.gguf", data=["d"], system=SYSTEM, probe="Why?", export=options)
        job_dir.write_job(TrainJob(spec=spec, dataset_id="d", code_version="x", nonce="n"))
        file = write_chain(job_dir.path / "gguf" / "F16.gguf", chain, **model)
        draft = ModelRecord(
            name=self.name,
            version=0,
            size="14b",
            kind="sft",
            job=job_dir.id,
            base="b.gguf",
            base_sha256="0" * 64,
            dataset_id="d",
            adapter_sha256="a",
            perplexity=figures,
            route="merged",
            quantized="F16",
        )
        told = [probe.model_copy(update={"greedy": greedy or f"{model.get('word', 'Because')}."}) for probe in self.probes.probes]
        noted = self.probes.model_copy(update={"probes": told})
        exported = Exported(route="merged", file="gguf/F16.gguf", quantized="F16")
        record = register(self.api, draft, exported, file, 2048, spec, job_dir, noted, uploading)
        return promoted(self.api, self.root, record, spec)

    def says(self, model: str) -> str:
        reply = self.api.chat(model, [{"role": "user", "content": "Why?"}], options={"num_predict": 9})
        return str(reply["message"]["content"])


@pytest.fixture
def node(root: Path, api: OllamaApi, probes: Probes, request: pytest.FixtureRequest) -> Node:
    return Node(root, api, probes, f"m{abs(hash(request.node.name)) % 10**8}")


def test_a_version_that_passes_gets_both_aliases_and_a_rollback_restores_the_answer(node: Node) -> None:
    first, note = node.register(GOOD)
    assert (first.tag, first.aliases, note) == (
        f"{node.name}:14b-v1",
        [f"{node.name}:14b", f"{node.name}:latest"],
        "",
    )
    node.register(GOOD, word="Therefore")
    assert (node.says(node.name), node.says(f"{node.name}:14b")) == ("Therefore.", "Therefore.")
    aliases.rollback(node.api, node.root, node.name)
    assert (node.says(node.name), node.says(f"{node.name}:14b")) == ("Because.", "Because.")
    assert node.says(f"{node.name}:14b-v2") == "Therefore."
    text = (node.root / first.folder / "gguf" / "F16.Modelfile").read_text()
    for part in ("FROM ./F16.gguf\n", f'SYSTEM """{SYSTEM}"""', 'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 2048"):
        assert part in text


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"chain": ENDLESS}, "did not end its turn"),
        ({"chain": EMPTY}, "its answer is empty"),
        ({"chain": LEAKING}, r"template tokens in its answer \(<\|im_start\|>\)"),
        ({"chain": GOOD, "template": ODD_TEMPLATE}, r"the server read \d+ prompt tokens, .* trained with \d+"),
        (
            {"chain": GOOD, "figures": WORSE},
            "perplexity is 3.01, that of the base 3.00",
        ),
        ({"chain": GOOD, "greedy": "Yes."}, "trained to begin with 'Yes.', and is served as 'Because.'"),
    ],
    ids=["endless", "empty", "leaking", "template", "worse", "other-weights"],
)
def test_what_is_wrong_is_told_and_no_alias_moves(node: Node, wrong: dict[str, Any], reason: str) -> None:
    node.register(GOOD)
    before = node.api.tags()
    with pytest.raises(GateFailed, match=reason) as failed:
        node.register(**wrong)
    assert "no alias was moved" in failed.value.hint
    after = node.api.tags()
    assert {tag: after[tag] for tag in before} == before
    assert node.says(node.name) == "Because."
    listed = aliases.listing(node.root)
    assert [each.tag for each in listed.models if each.tag.startswith(node.name)] == [f"{node.name}:14b-v1"]
    (kept,) = [each for each in listed.failed if each.tag.startswith(node.name)]
    assert kept.tag == f"{node.name}:14b-v2" and kept.tag in after, "it stays at the server for inspection"
    assert kept.fault == str(failed.value)
    assert (node.root / f"models/{node.name}/v2/gguf/F16.gguf").exists()
    with closing(Service(node.root)) as service:
        pulled = service.artifacts(ArtifactsArgs(model=kept.tag))
    assert pulled.tag == kept.tag and "gguf/F16.gguf" in {each.name for each in pulled.files}, "and can be fetched"


def test_the_end_of_a_turn_as_text_is_a_leak(api: OllamaApi, root: Path, probes: Probes) -> None:
    """Where the server knows no such stop nothing hides it."""
    path = write_chain(root / "leak.gguf", LEAKING, opened="<|im_end|")
    api.create("leak", files={"model.gguf": path}, system=SYSTEM, parameters={"stop": ["</s>"]})
    with pytest.raises(GateFailed, match=r"template tokens in its answer \(<\|im_end\|>\)"):
        require_gate(api, "leak:latest", probes, BETTER, exact=False)


def test_a_figure_that_is_no_number_is_not_better(api: OllamaApi, root: Path, probes: Probes) -> None:
    api.create("nan", files={"model.gguf": write_chain(root / "nan.gguf", GOOD)}, system=SYSTEM)
    with pytest.raises(GateFailed, match="perplexity is nan"):
        require_gate(api, "nan:latest", probes, BETTER.model_copy(update={"tuned": float("nan")}), exact=True)


def test_all_faults_are_told_at_once(node: Node) -> None:
    with pytest.raises(GateFailed) as failed:
        node.register(ENDLESS, figures=Perplexity(rows=2, tokens=9, base=3.0, tuned=4.0))
    for reason in ("did not end its turn", "perplexity is 4.00", "is served as"):
        assert reason in str(failed.value)


def test_a_tag_that_hafs_did_not_make_is_never_moved(node: Node) -> None:
    path = write_chain(node.root / "theirs.gguf", GOOD, word="Mine")
    node.api.create(f"{node.name}:latest", files={"model.gguf": path})
    for word in ("One", "Two"):
        record, note = node.register(GOOD, word=word)
        assert "not made by hafs and was left alone" in note
        assert record.aliases == [f"{node.name}:14b"]
    aliases.rollback(node.api, node.root, node.name)
    assert (node.says(f"{node.name}:latest"), node.says(f"{node.name}:14b")) == ("Mine.", "One.")


def test_with_promotion_by_evaluation_the_node_stops_at_the_version(node: Node) -> None:
    node.register(GOOD)
    record, note = node.register(GOOD, word="Therefore", promote="eval")
    assert record.aliases == [] and f"hafs models promote {record.tag}" in note
    assert node.says(node.name) == "Because."
    aliases.promote(node.api, node.root, record.tag)
    assert node.says(node.name) == "Therefore."
    assert registry.resolve(node.root, node.name).tag == record.tag


def test_a_version_that_is_made_anew_has_to_pass_anew(node: Node) -> None:
    """Its tag was lost, and what is made of the same files now is served otherwise."""
    record, _ = node.register(GOOD)
    node.api.delete(record.tag)
    node.jobs = 0  # the same job again
    with pytest.raises(GateFailed):
        node.register(GOOD, greedy="Yes.")
    (kept,) = [each for each in registry.records(node.root) if each.name == node.name]
    assert (kept.tag, kept.passed, kept.digest) == (record.tag, False, node.api.tags()[record.tag]) and kept.fault
    with pytest.raises(JobNotFound):
        aliases.promote(node.api, node.root, record.tag)


def test_what_is_uploaded_is_told_and_may_be_stopped_there(node: Node) -> None:
    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        node.register(GOOD, uploading=stop, word="Stopped")
    assert f"{node.name}:14b-v1" not in node.api.tags()
    assert node.register(GOOD, word="Going")[0].version == 2, "the number belongs to the job that was stopped"
    node.jobs = 0
    assert node.register(GOOD, word="Stopped")[0].version == 1


def test_a_tag_that_somebody_else_makes_during_the_upload_is_left_alone(node: Node) -> None:
    """Two hafs may share one server: each has a registry of its own."""
    path = write_chain(node.root / "other.gguf", GOOD, word="Mine")

    def meanwhile(done: int, total: int) -> None:
        if f"{node.name}:14b-v1" not in node.api.tags():
            node.api.create(f"{node.name}:14b-v1", files={"model.gguf": path})

    with pytest.raises(ProviderUnavailable, match="somebody else has made"):
        node.register(GOOD, word="Late", uploading=meanwhile)
    node.jobs = 0  # the next attempt
    record, _ = node.register(GOOD, word="Late")
    assert (record.version, node.says(f"{node.name}:14b-v1"), node.says(node.name)) == (2, "Mine.", "Late.")
    aliases.prune(node.api, node.root, 1, node.name)
    assert node.says(f"{node.name}:14b-v1") == "Mine."


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(("chain", "writes"), [(GOOD, 5), (ENDLESS, 3)], ids=["good", "bad"])
def test_killed_at_any_write_of_the_registry_it_ends_as_if_it_had_not_been(
    node: Node, monkeypatch: pytest.MonkeyPatch, side: str, chain: dict[int, int], writes: int
) -> None:
    """Reserved, made, passed or not, promoted, settled: in between the alias names what passed, and the next attempt ends it."""
    before, _ = node.register(GOOD, word="First")
    calm = registry.write
    for nth in range(writes):
        left = nth

        def write(root: Path, models: Iterable[ModelRecord]) -> None:
            nonlocal left
            left -= 1
            if left == -1 and side == "before":
                raise Crash
            calm(root, models)
            if left == -1:
                raise Crash

        word = f"Word{nth}"
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(registry, "write", write)
            node.register(chain, word=word)
        named = node.api.tags()[f"{node.name}:latest"]
        assert named in {each.digest for each in registry.records(node.root) if each.counts}
        node.jobs -= 1
        if chain is GOOD:
            before, _ = node.register(chain, word=word)
        else:
            with pytest.raises(GateFailed):
                node.register(chain, word=word)
        assert node.api.tags()[f"{node.name}:latest"] == before.digest
        own = [each for each in registry.records(node.root) if each.name == node.name]
        assert [each.version for each in own] == list(range(1, nth + 3)), "no number is lost or given twice"
        listed = [each for each in aliases.listing(node.root).models if each.tag.startswith(node.name)]
        assert [each.note for each in listed if each.note] == []
        assert [each.tag for each in listed if each.alias] == [before.tag]


def test_a_crash_after_the_gate_is_made_good_by_the_next_attempt(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_node.export.register.promote", lambda *_: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception, match="killed here"):
        node.register(GOOD)
    assert f"{node.name}:latest" not in node.api.tags()
    monkeypatch.undo()
    monkeypatch.setenv("HAFS_RUNTIME", "embedded")
    node.jobs = 0  # the same job again
    record, _ = node.register(GOOD)
    assert (record.version, node.says(node.name)) == (1, "Because.")
