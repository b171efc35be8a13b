"""Modelfile: the words that `ollama create -f` reads."""

from trainer_node.export.modelfile import Dress, modelfile


def test_a_whole_one() -> None:
    parameters = {"stop": ["<|im_end|>", 'a "b"'], "temperature": 0, "num_ctx": 2048}
    dress = Dress(system="Be brief.\nBe kind.", template="{{ .Prompt }}", parameters=parameters, licenses=["free", "as is"])
    text = modelfile("./Q8_0.gguf", dress, comment="m:v1\nnew")
    assert text.splitlines() == [
        "# m:v1",
        "# new",
        "FROM ./Q8_0.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'SYSTEM """Be brief.',
        'Be kind."""',
        'LICENSE """free"""',
        'LICENSE """as is"""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "a "b""',
        "PARAMETER temperature 0",
        "PARAMETER num_ctx 2048",
    ]


def test_an_adapter_stands_on_its_base() -> None:
    text = modelfile("hafs-base:0123", Dress(), adapter="./adapter.gguf")
    assert text == "FROM hafs-base:0123\nADAPTER ./adapter.gguf\n"


def test_a_text_that_no_modelfile_can_hold_is_said_to_be_left_out() -> None:
    text = modelfile("./x.gguf", Dress(system='say """'))
    assert "SYSTEM is left out" in text and '\nSYSTEM """' not in text
