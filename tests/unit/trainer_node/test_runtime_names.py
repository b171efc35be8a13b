"""Model names, durations, options and the address of a server."""

import socket

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import ConfigError
from trainer_node.runtime.launch import is_of_this_machine, ollama_url
from trainer_node.runtime.models import ApiError, ModelName
from trainer_node.runtime.options import FOREVER_S, field, keep_alive_s, merged_options, schema_of, top_logprobs
from trainer_node.runtime.requests import is_local, is_local_origin


@pytest.mark.parametrize(
    ("text", "short", "full"),
    [
        ("base", "base:latest", "registry.ollama.ai/library/base:latest"),
        ("base:v1", "base:v1", "registry.ollama.ai/library/base:v1"),
        ("me/base", "me/base:latest", "registry.ollama.ai/me/base:latest"),
        ("registry.ollama.ai/library/base:latest", "base:latest", "registry.ollama.ai/library/base:latest"),
        ("example.org/me/base:q4", "example.org/me/base:q4", "example.org/me/base:q4"),
        ("qwen2.5-coder:14b", "qwen2.5-coder:14b", "registry.ollama.ai/library/qwen2.5-coder:14b"),
    ],
)
def test_names_are_completed_and_shortened(text: str, short: str, full: str) -> None:
    name = ModelName.parse(text)
    assert (str(name), name.full) == (short, full)


@pytest.mark.parametrize(
    "text", ["", "a b", "a:", ":a", "../a", "a/../b", ".a", "-a", "a/b/c/d", "a" * 81, "a\n", "a:b:c", "n.s/a", "/a"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ApiError, match="invalid model name"):
        ModelName.parse(text)


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=30))
def test_no_name_leaves_its_folder(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except ApiError:
        return
    for part in (name.host, name.namespace, name.model, name.tag):
        assert part and not part.startswith(".") and not set(part) & set("/\\:\0")
    assert ModelName.parse(str(name)) == name


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 300),
        (0, 0),
        ("0", 0),
        (-1, FOREVER_S),
        ("-1s", FOREVER_S),
        ("10m", 600),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        (7, 7),
        (10**12, FOREVER_S),  # beyond what a date can be
        ("9999999h", FOREVER_S),
        (float("inf"), FOREVER_S),
    ],
)
def test_keep_alive(value: object, seconds: float) -> None:
    assert keep_alive_s(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("value", "error"), [("soon", "invalid duration"), ("5", "missing unit"), ("", "invalid"), ("5m5", "invalid"), (True, "json")]
)
def test_a_bad_keep_alive_is_refused(value: object, error: str) -> None:
    with pytest.raises(ApiError, match=error) as caught:
        keep_alive_s(value)
    assert caught.value.status == 400


def test_a_request_overrides_the_model_and_the_model_the_defaults() -> None:
    options = merged_options({"temperature": 0.2, "num_ctx": 512, "no_such": 1}, {"temperature": 0})
    assert (options["temperature"], options["num_ctx"], options["top_k"]) == (0.0, 512, 40)
    assert "no_such" not in options


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"num_ctx": "many"}, 'option "num_ctx" must be of type integer'),
        ({"num_ctx": True}, 'option "num_ctx" must be of type integer'),
        ({"stop": "x"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
        ({"num_ctx": float("inf")}, 'option "num_ctx" must be of type integer'),  # 1e999
        ({"temperature": 10**400}, 'option "temperature" must be of type float32'),
    ],
)
def test_an_option_of_a_wrong_type_is_refused(options: dict[str, object], error: str) -> None:
    with pytest.raises(ApiError) as caught:
        merged_options(options)
    assert (caught.value.status, str(caught.value)) == (500, error)


def test_a_format_is_json_a_schema_or_refused() -> None:
    assert schema_of(None) is None
    assert schema_of("json") == {}
    assert schema_of({"type": "object"}) == {"type": "object"}
    with pytest.raises(ApiError, match="expected"):
        schema_of("yaml")


@pytest.mark.parametrize("value", [-1, 21, "many", 2.5])
def test_top_logprobs_has_the_bounds_of_ollama(value: object) -> None:
    assert (top_logprobs({}), top_logprobs({"top_logprobs": 20})) == (0, 20)
    with pytest.raises(ApiError, match="top_logprobs must be between 0 and 20"):
        top_logprobs({"top_logprobs": value})


def test_a_field_of_another_type_is_named() -> None:
    assert (field({}, "prompt", str), field({"options": None}, "options", dict)) == ("", {})
    with pytest.raises(ApiError, match="cannot unmarshal array into field prompt of type string") as caught:
        field({"prompt": ["x"]}, "prompt", str)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("box", "http://box:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://box", "http://box:80"),
        ("https://box/ollama/", "https://box:443/ollama"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("[::]:9000", "http://[::1]:9000"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(host: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert ollama_url() == url


def test_an_ollama_host_that_is_no_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "box:notaport")
    with pytest.raises(ConfigError, match="OLLAMA_HOST=box:notaport"):
        ollama_url()


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1:5", True),
        ("[::1]:5", True),
        ("", False),
        ("evil.example", False),
        ("localhost.evil", False),
        ("localhost.", False),
        ("127.0.0.1.evil.example:80", False),
        ("127.0.0.1@evil.example", False),
        ("0.0.0.0", False),
        ("[::ffff:10.0.0.1]", False),
        ("[", False),
    ],
)
def test_loopback(host: str, local: bool) -> None:
    assert is_local(host) is local
    assert is_local_origin(f"http://{host}") is local


@pytest.mark.parametrize("origin", ["null", "", "file://", "http://[", "localhost", "chrome-extension://abc"])
def test_an_origin_without_a_host_of_ours_is_foreign(origin: str) -> None:
    assert not is_local_origin(origin)


def test_a_server_runs_here_or_elsewhere() -> None:
    own = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET]
    for host in ("127.0.0.1", "127.9.9.9", "[::1]", "localhost", *own):
        assert is_of_this_machine(f"http://{host}:11434"), host
    for host in ("192.0.2.7", "[2001:db8::7]", "no-such-host.invalid"):
        assert not is_of_this_machine(f"https://{host}"), host
