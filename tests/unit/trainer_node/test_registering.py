"""The gate, against a server that answers what the test tells it to; what is kept of a version, and other forms of it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from config.contracts.job import Perplexity
from config.contracts.sample import Message
from config.contracts.wire import ExportArgs, ExportState
from config.errors import BadRequest, GateFailed, JobFailed
from trainer_node import registry
from trainer_node.export import request
from trainer_node.export.gate import require_gate
from trainer_node.export.probes import Probe, Probes
from trainer_node.export.register import keep_files
from trainer_node.jobdir import JobDir
from trainer_node.ollama import OllamaApi, register_gguf
from trainer_node.processes import start_detached

ASKED = [Message(role="system", content="Be brief."), Message(role="user", content="Why?")]
GOOD = {"message": {"content": "Because."}, "done_reason": "stop", "prompt_eval_count": 20}
PROBE = Probe(messages=ASKED, prompt_tokens=20, greedy="Because.", ended=True, first=["Because", "So", ""])
BETTER = Perplexity(rows=1, tokens=2, base=9, tuned=3)


class FakeServer:
    """The part of OllamaApi that the gate uses."""

    def __init__(self, *replies: dict[str, Any]) -> None:
        self.replies = list(replies)
        self.asked: list[list[dict[str, str]]] = []

    def chat(self, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(messages)
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def gate(server: Any, *probes: Probe, figures: Perplexity = BETTER, exact: bool = True) -> str:
    return require_gate(server, "m:v1", Probes(probes=list(probes or [PROBE]), special=["<|im_end|>"]), figures, exact=exact)


def test_the_gate_asks_with_and_without_the_system_message() -> None:
    server = FakeServer(GOOD)
    assert gate(server) == "Because."
    assert [[each["role"] for each in messages] for messages in server.asked] == [["user"], ["system", "user"]]


def test_of_the_other_probes_only_the_beginning_is_looked_at() -> None:
    other = Probe(messages=ASKED, prompt_tokens=20, greedy="Once upon", first=["Once"])
    begun = {"message": {"content": "Once upon a time"}, "done_reason": "length", "prompt_eval_count": 20}
    server = FakeServer(GOOD, GOOD, begun)
    assert gate(server, PROBE, other) == "Because."
    assert len(server.asked) == 3
    with pytest.raises(GateFailed, match="trained to begin with 'Once upon', and is served as 'At once'"):
        gate(FakeServer(GOOD, GOOD, begun | {"message": {"content": "At once"}}), PROBE, other)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"prompt_eval_count": 37}, "37 prompt tokens"),
        ({"done_reason": "length"}, "did not end its turn"),
        ({"message": {"content": "Because.<|im_end|>"}}, "template tokens"),
        ({"message": {"content": " "}}, "empty"),
        ({"message": {"content": "Because not."}}, "served as 'Because not.'"),
    ],
)
def test_the_gate_names_what_is_wrong(fault: dict[str, Any], reason: str) -> None:
    with pytest.raises(GateFailed, match=reason):
        gate(FakeServer(GOOD | fault))


def test_a_system_message_that_was_not_registered_fails_the_gate() -> None:
    with pytest.raises(GateFailed, match="read 9"):
        gate(FakeServer(GOOD | {"prompt_eval_count": 9}, GOOD))


def test_a_server_that_cannot_answer_with_the_model_fails_the_gate() -> None:
    """It believes what create is told; what it says then is the fault, and the version is kept with it."""
    refusal = BadRequest('400 "m:v1" does not support chat')

    class Refusing(FakeServer):
        def chat(self, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
            raise refusal

    with pytest.raises(GateFailed, match=r"refuses to answer: 400 .* does not support chat") as failed:
        gate(Refusing(GOOD))
    assert "server's log" in failed.value.hint


def test_of_a_character_of_several_tokens_the_first_one_tells_nothing() -> None:
    server = FakeServer(GOOD | {"message": {"content": "\u65e5\u672c"}})
    gate(server, PROBE.model_copy(update={"first": ["Because", "\ufffd"]}), exact=False)
    with pytest.raises(GateFailed, match="served as"):
        gate(server, PROBE.model_copy(update={"first": ["Because", "a\ufffd"]}), exact=False)


@pytest.mark.parametrize(
    ("text", "passes"), [("Because.", True), ("So it is.", True), (" Because", True), ("Beware", False), ("Never", False)]
)
def test_of_quantized_weights_the_first_token_has_to_be_a_likely_one(text: str, passes: bool) -> None:
    server = FakeServer(GOOD | {"message": {"content": text}})
    if passes:
        gate(server, exact=False)
    else:
        with pytest.raises(GateFailed, match="one of 'Because', 'So'"):
            gate(server, exact=False)


@pytest.mark.parametrize("text", ["Because of", "Because. And so on"])
def test_an_answer_that_was_not_ended_may_go_on(text: str) -> None:
    gate(FakeServer(GOOD | {"message": {"content": text}}), PROBE.model_copy(update={"greedy": "Because", "ended": False}))


@pytest.mark.parametrize(("tuned", "told"), [(9.0, ""), (9.01, "9.01"), (float("nan"), "nan")])
def test_what_is_worse_than_its_base_does_not_pass(tuned: float, told: str) -> None:
    figures = BETTER.model_copy(update={"tuned": tuned})
    if not told:
        gate(FakeServer(GOOD), figures=figures)
    else:
        with pytest.raises(GateFailed, match=f"perplexity is {told}, that of the base 9.00"):
            gate(FakeServer(GOOD), figures=figures)


def test_results_are_kept_under_the_models_name_and_again_on_a_retry(tmp_path: Path) -> None:
    job_dir = JobDir(tmp_path / "jobs" / "one")
    job_dir.adapter.mkdir(parents=True)
    (job_dir.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    kept = [
        "adapter.gguf",
        "metrics.jsonl",
        *(f"{name}.json" for name in ("job", "training_stats", "evaluation", "probes", "export")),
    ]
    for name in (*kept, "plan.json"):
        (job_dir.path / name).write_text(name)
    target = tmp_path / "models" / "m" / "v1"
    for _ in range(2):
        keep_files(job_dir, target, {"Modelfile": "FROM x"})
        found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        assert found == {"adapter/adapter_model.safetensors", "Modelfile", *kept}
    assert [path.name for path in target.parent.iterdir()] == ["v1"]


def test_what_an_earlier_export_said_does_not_count_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is gone, and the process that is to make it again ends at once: nothing is done."""
    named = {"name": "m", "version": 1, "kind": "sft", "job": "j", "base": "b", "base_sha256": "s", "dataset_id": "d"}
    record = registry.ModelRecord.model_validate({**named, "adapter_sha256": "a", "passed": True})
    registry.save(tmp_path, record)
    done = ExportState(tag=record.tag, state="done", files=["gguf/Q8_0.gguf"])
    request.Form(tmp_path, record, "merged", "Q8_0").write(done)

    ends = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(request, "start_detached", lambda argv, **where: start_detached(ends, **where))
    args = ExportArgs(model="m", route="merged", quantize="Q8_0")
    with pytest.raises(JobFailed, match="was cut off; its log is"):
        request.ask(tmp_path, args)
    file = tmp_path / record.folder / "gguf" / "Q8_0.gguf"
    file.parent.mkdir()
    file.touch()
    request.Form(tmp_path, record, "merged", "Q8_0").write(done)
    assert request.ask(tmp_path, args) == done


def test_a_name_that_no_model_can_have_is_refused_before_the_server_is_asked(tmp_path: Path) -> None:
    with OllamaApi("http://127.0.0.1:9") as nobody, pytest.raises(BadRequest, match="no name"):
        register_gguf(nobody, "no name", tmp_path / "tiny.gguf")
