import pytest
from pydantic import ValidationError

from config.contracts.base_name import HubFile, hub_file, is_plain
from config.contracts.job import JobSpec


@pytest.mark.parametrize(
    ("base", "meant"),
    [
        ("hf:bartowski/SmolLM2-135M-Instruct-GGUF/a.Q8_0.gguf", ("bartowski/SmolLM2-135M-Instruct-GGUF", "", "a.Q8_0.gguf")),
        ("hf:o/r@v1.0/f.gguf", ("o/r", "v1.0", "f.gguf")),
        ("hf:o/r@" + "a" * 40 + "/deep/er/f.gguf", ("o/r", "a" * 40, "deep/er/f.gguf")),
        ("hf:Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", "", "")),
        ("hf:o/r@v1.0", ("o/r", "v1.0", "")),
    ],
)
def test_a_name_of_the_hub_and_back(base: str, meant: tuple[str, str, str]) -> None:
    assert hub_file(base) == HubFile(*meant)
    assert str(hub_file(base)) == base


@pytest.mark.parametrize(
    "base",
    [
        "hf:",
        "hf:o",
        "hf:o/r/",
        "hf:r.gguf",
        "hf://o/r/f.gguf",
        "hf:../../etc/passwd.gguf",
        "hf:o/r/../f.gguf",
        "hf:o/r/a..b/f.gguf",
        "hf:o--p/r/f.gguf",
        "hf:o/r@refs/pr/1@x/f.gguf",
        "hf:o/r@/f.gguf",
        "hf:o/r/f f.gguf",
        "hf:o/r/f?x=.gguf",
        "hf:o/r/nul.gguf",
        "hf:o/con/f.gguf",
        "hf:o/r/" + "x" * 97 + ".gguf",
        "hf:o/r/f.gguf\n",
        "hf:o/r\\f.gguf",
    ],
)
def test_what_is_none_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match="OWNER/REPO"):
        hub_file(base)


def test_other_files_of_a_repository_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors is no GGUF file; write hf:o/r for the whole"):
        hub_file("hf:o/r/model.safetensors")


def test_one_part_of_several_is_refused_before_it_is_fetched() -> None:
    with pytest.raises(ValueError, match=r"one of several parts: name a GGUF that is one file, or write hf:o/r$"):
        hub_file("hf:o/r/q4/m-Q4_K_M-00001-of-00003.gguf")
    assert hub_file("hf:o/r/m-00001-of-00003-joined.gguf").file


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        *[("model-00001-of-00002.safetensors", True), ("tokenizer_config.json", True)],
        *[("..\\..\\x.json", False), ("C:x.json", False), ("a/x.json", False), ("..", False), (".x.json", False), ("", False)],
        *[("con.json", False), ("x.json.", False), ("x.json\n", False), ("x" * 97, False)],
    ],
)
def test_what_a_repository_calls_a_file(name: str, plain: bool) -> None:
    assert is_plain(name) is plain


def test_a_job_is_refused_where_it_is_written_down() -> None:
    assert JobSpec(kind="sft", name="m", base="hf:o/r/f.gguf", data=["d"]).base == "hf:o/r/f.gguf"
    assert JobSpec(kind="sft", name="m", base="/any/path", data=["d"])
    with pytest.raises(ValidationError, match="is no GGUF file"):
        JobSpec(kind="sft", name="m", base="hf:o/r/model.safetensors", data=["d"])
