"""The gate and the alias, against a server that answers what the test tells it to."""

from pathlib import Path
from typing import Any

import pytest

from config.contracts.sample import Message
from config.errors import BadRequest, GateFailed, JobFailed
from trainer_node.dataset import Encoded, Row
from trainer_node.export.gate import require_gate
from trainer_node.export.register import keep_files, move_alias
from trainer_node.jobdir import JobDir
from trainer_node.ollama import OllamaApi, register_gguf
from trainer_node.registry import ModelRecord, resolve, save
from trainer_node.train.agreement import require_agreement

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
GOOD = {"message": {"content": "Because."}, "done_reason": "stop", "prompt_eval_count": 20}


class FakeServer:
    """The part of OllamaApi that the gate, the alias and the comparison of tokens use."""

    def __init__(
        self, *replies: dict[str, Any], tags: dict[str, str] | None = None, tokens: dict[str, list[int]] | None = None
    ) -> None:
        self.replies, self.present, self.tokens = list(replies), tags or {}, tokens
        self.asked: list[list[dict[str, str]]] = []

    def chat(self, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(messages)
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def tags(self) -> dict[str, str]:
        return self.present

    def copy(self, source: str, target: str) -> None:
        self.present[target] = self.present[source]

    def tokenize(self, model: str, text: str) -> list[int] | None:
        return None if self.tokens is None else self.tokens[text]


def gate(server: Any) -> str:
    return require_gate(server, "m:v1", 20, MESSAGES, ["<|im_end|>"])


def test_the_gate_asks_with_and_without_the_system_message() -> None:
    server = FakeServer(GOOD)
    assert gate(server) == "Because."
    assert server.asked == [MESSAGES[1:], MESSAGES]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"prompt_eval_count": 37}, "37 prompt tokens"),
        ({"done_reason": "length"}, "did not end its turn"),
        ({"message": {"content": "x<|im_end|>"}}, "template tokens"),
        ({"message": {"content": " "}}, "empty"),
    ],
)
def test_the_gate_names_what_is_wrong(fault: dict[str, Any], reason: str) -> None:
    with pytest.raises(GateFailed, match=reason):
        gate(FakeServer(GOOD | fault))


def test_a_system_message_that_was_not_registered_fails_the_gate() -> None:
    with pytest.raises(GateFailed, match="read 9"):
        gate(FakeServer(GOOD | {"prompt_eval_count": 9}, GOOD))


def record(version: int, digest: str) -> ModelRecord:
    return ModelRecord(
        name="m",
        version=version,
        kind="sft",
        job=f"job{version}",
        base="b",
        base_sha256="s",
        dataset_id="d",
        adapter_sha256="a",
        digest=digest,
        passed=True,
    )


def test_the_alias_moves_to_the_newest_version(tmp_path: Path) -> None:
    server: Any = FakeServer(tags={"m:v1": "one", "m:v2": "two"})
    for made in (record(1, "one"), record(2, "two")):
        save(tmp_path, made)
        moved, note = move_alias(server, tmp_path, made)
        assert (moved.alias, note) == ("m:latest", "")
    assert server.present["m:latest"] == "two"
    assert resolve(tmp_path, "m:v1").alias == ""


@pytest.mark.parametrize("theirs", ["m:latest", "M:latest", "m:Latest"])
def test_an_alias_that_hafs_did_not_make_is_left_alone(tmp_path: Path, theirs: str) -> None:
    server: Any = FakeServer(tags={"m:v1": "one", theirs: "someone else's"})
    save(tmp_path, record(1, "one"))
    moved, note = move_alias(server, tmp_path, record(1, "one"))
    assert moved.alias == ""
    assert "not made by hafs" in note
    assert server.present == {"m:v1": "one", theirs: "someone else's"}


def test_results_are_kept_under_the_models_name_and_again_on_a_retry(tmp_path: Path) -> None:
    job_dir = JobDir(tmp_path / "jobs" / "one")
    job_dir.adapter.mkdir(parents=True)
    (job_dir.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    for name in ("adapter.gguf", "job.json", "metrics.jsonl", "training_stats.json", "evaluation.json", "plan.json"):
        (job_dir.path / name).write_text(name)
    target = tmp_path / "models" / "m" / "v1"
    for _ in range(2):
        keep_files(job_dir, target)
        found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        assert found == {
            "adapter/adapter_model.safetensors",
            "adapter.gguf",
            "job.json",
            "metrics.jsonl",
            "training_stats.json",
            "evaluation.json",
        }
    assert [path.name for path in target.parent.iterdir()] == ["v1"]


ROW = Encoded(Row("s", (Message(role="user", content="q"),), ("a",)), "q", ("a",), [1, 2], ([3],))


def test_agreement_compares_every_text() -> None:
    server: Any = FakeServer(tokens={"q": [1, 2], "a": [3]})
    assert require_agreement(server, "base", [ROW, ROW]) == "2 rows have the same tokens at the runtime (2 texts compared)"


def test_a_disagreement_names_the_row_and_both_lists() -> None:
    server: Any = FakeServer(tokens={"q": [1, 2], "a": [4, 5]})
    with pytest.raises(JobFailed, match=r"row 1 .*\[3\], served as \[4, 5\]"):
        require_agreement(server, "base", [ROW])


def test_a_server_that_cannot_tokenize_is_asked_for_lengths() -> None:
    counted: Any = FakeServer({"prompt_eval_count": 2})
    assert "20 prompts" not in require_agreement(counted, "base", [ROW] * 20)
    assert len(counted.asked) == 16
    with pytest.raises(JobFailed, match="trained with 2 tokens, served with 21"):
        require_agreement(FakeServer({"prompt_eval_count": 21}), "base", [ROW])  # type: ignore[arg-type]


def test_a_name_that_no_model_can_have_is_refused_before_the_server_is_asked(tmp_path: Path) -> None:
    with OllamaApi("http://127.0.0.1:9") as nobody, pytest.raises(BadRequest, match="no name"):
        register_gguf(nobody, "no name", tmp_path / "tiny.gguf")
