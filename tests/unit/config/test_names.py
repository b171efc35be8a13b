import pytest
from pydantic import ValidationError

from config.contracts.job import JobSpec
from config.contracts.manifest import DatasetManifest
from config.contracts.names import is_portable
from config.contracts.wire import Artifact, RuntimeArgs

EVIL = [
    *(
        "../x",
        "..",
        ".",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:x",
        "C:\\x",
        "\\\\host\\share",
        "~",
        "-rf",
        "",
        " ",
        "a b",
        "a\0b",
        "a\nb",
    ),
    *("CON", "con", "NUL", "nul.txt", "Aux.tar.gz", "prn", "COM1", "lpt9.log", "name.", "x" * 300, "naïve", "a:stream"),
]


@pytest.mark.parametrize("name", ["con", "NUL.txt", "aux.tar.gz", "COM0", "lpt1", "dot.", "blank "])
def test_what_windows_keeps_for_itself(name: str) -> None:
    assert not is_portable(name)


@pytest.mark.parametrize("name", ["console", "nullable", "com", "com10", "lpt", "aux-box", "a.con", "_con"])
def test_what_only_looks_like_it(name: str) -> None:
    assert is_portable(name)


@pytest.mark.parametrize("name", EVIL)
def test_no_evil_name_crosses_the_wire(name: str) -> None:
    with pytest.raises(ValidationError):
        DatasetManifest(name=name, campaigns=[], segments=[])
    with pytest.raises(ValidationError):
        DatasetManifest(name="demo", campaigns=["demo", name], segments=[])
    with pytest.raises(ValidationError):
        JobSpec(kind="sft", name=name.lower(), base="x.gguf", data=["demo"])
    with pytest.raises(ValidationError):
        JobSpec(kind="sft", name="coder", base="x.gguf", data=[name])
    if name != "a/b" and name != "x" * 300:  # a path of names is what an artifact may have, and it may be long
        with pytest.raises(ValidationError):
            Artifact(name=name, path="/x", bytes=0, sha256="0" * 64)
    with pytest.raises(ValidationError):
        Artifact(name=f"adapter/{name}/../../x", path="/x", bytes=0, sha256="0" * 64)


@pytest.mark.parametrize(
    "name", sorted({*EVIL, "a//b", "a::b", "/a", "a/", "models/CON", "x/../y"} - {"a/b", "", "C:x", "a:stream"})
)
def test_no_evil_name_is_that_of_a_model(name: str) -> None:
    with pytest.raises(ValidationError):
        RuntimeArgs(model=name)


def test_names_as_model_servers_write_them() -> None:
    for name in ("", "hafs-coder", "hafs-coder:v1", "hf.co/me/Model_1.5:Q4_K_M", "localhost:5000/me/model:latest"):
        assert RuntimeArgs(model=name).model == name
