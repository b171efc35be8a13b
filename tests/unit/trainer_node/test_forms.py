"""Which form of a trained model a job registers."""

from pathlib import Path

import pytest

from config.contracts.job import ExportOptions
from trainer_node.export.forms import wanted_form


@pytest.mark.parametrize(
    ("asked", "of_gguf", "of_folder"),
    [
        ({}, ("adapter", ""), ("merged", "Q8_0")),
        ({"quantize": "Q4_K_M"}, ("merged", "Q4_K_M"), ("merged", "Q4_K_M")),
        ({"route": "adapter"}, ("adapter", ""), ("adapter", "")),
        ({"route": "merged"}, ("merged", "F16"), ("merged", "F16")),
        ({"route": "merged", "quantize": "Q5_1"}, ("merged", "Q5_1"), ("merged", "Q5_1")),
    ],
)
def test_what_is_registered(asked: dict[str, str], of_gguf: tuple[str, str], of_folder: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF")
    options = ExportOptions.model_validate(asked)
    assert (wanted_form(options, file), wanted_form(options, tmp_path)) == (of_gguf, of_folder)


def test_an_adapter_is_not_quantized() -> None:
    with pytest.raises(ValueError, match="quantize needs route"):
        ExportOptions(route="adapter", quantize="Q4_K_M")
