import subprocess
import sys

import pytest

from agents.prices import Price, price_of
from agents.task import Usage


def test_thinking_costs_as_much_as_output() -> None:
    usage = Usage(prompt_tokens=1000, completion_tokens=20, thinking_tokens=30)
    assert Price(1e-6, 1e-5).cost(usage) == pytest.approx(1e-3 + 5e-4)


@pytest.mark.parametrize("model", ["gemini-2.5-flash", "models/gemini-2.5-flash", "gemini-3-flash-preview"])
def test_known_models_have_a_price_per_token(model: str) -> None:
    price = price_of("gemini", model)
    assert price is not None
    assert 1e-8 < price.input_usd < price.output_usd < 1e-4


@pytest.mark.parametrize(
    ("provider", "model"), [("gemini", "gemini-99-nope"), ("nobody", "gemini-2.5-flash"), ("ollama", "qwen3")]
)
def test_what_is_not_known_has_no_price(provider: str, model: str) -> None:
    assert price_of(provider, model) is None


def test_the_table_needs_no_network() -> None:
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from agents.prices import price_of\n"
        "assert price_of('gemini', 'gemini-2.5-flash')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_scheduler_loads_no_sdk() -> None:
    sdks = ("ollama", "google.genai", "httpx", "aiohttp", "genai_prices")
    code = f"import agents.scheduler, sys; print([name for name in {sdks} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True).stdout
    assert shown.strip() == "[]"
