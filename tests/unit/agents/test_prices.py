import random
import subprocess
import sys
from pathlib import Path

import pytest

from agents.prices import PRICES_FILE, Price, price_of, unknown_price
from agents.task import Usage
from config.errors import ConfigError

LONG = Price(1e-6, 1e-5, 1e-7, tiers=((200_000, Price(2e-6, 2e-5, 2e-7)),))

MINE = """
[[price]]
provider = "openai"
base_url = "https://llm.example.com/v1"
model    = "mine"
input    = 0.5
output   = 2.0
cached   = 0.1

[[price]]
provider = "gemini"
model    = "gemini-2.5-flash"
input    = 1.0
output   = 10.0
batch    = 0.25
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / PRICES_FILE
    path.write_text(MINE)
    return path


def test_thinking_costs_as_much_as_output() -> None:
    usage = Usage(prompt_tokens=1000, completion_tokens=20, thinking_tokens=30)
    assert Price(1e-6, 1e-5).cost(usage) == pytest.approx(1e-3 + 5e-4)


def test_cached_prompt_tokens_have_their_own_price() -> None:
    usage = Usage(prompt_tokens=1000, completion_tokens=1, cached_tokens=900)
    assert Price(1e-6, 1e-5, 1e-7).cost(usage) == pytest.approx(100e-6 + 90e-6 + 1e-5)
    assert Price(1e-6, 1e-5).cost(usage) == pytest.approx(1e-3 + 1e-5)


def test_a_long_prompt_makes_the_whole_call_dearer() -> None:
    assert LONG.cost(Usage(prompt_tokens=200_000, completion_tokens=10)) == pytest.approx(0.2 + 1e-4)
    assert LONG.cost(Usage(prompt_tokens=200_001, completion_tokens=10)) == pytest.approx(0.400002 + 2e-4)


def test_the_worst_case_takes_the_dearest_tier_that_can_be_reached() -> None:
    assert LONG.at_most(200_000, 10) == pytest.approx(0.2 + 1e-4)
    assert LONG.at_most(200_001, 10) == pytest.approx(0.400002 + 2e-4)


def test_no_call_costs_more_than_its_worst_case() -> None:
    rng = random.Random(7)
    for _ in range(2000):
        tiers = tuple((above, Price(rng.random(), rng.random(), rng.random())) for above in sorted(rng.sample(range(500), 2)))
        price = Price(rng.random(), rng.random(), rng.choice([None, rng.random()]), tiers)
        prompt, output = rng.randint(1, 600), rng.randint(1, 50)
        usage = Usage(rng.randint(0, prompt), output, cached_tokens=0)
        usage = Usage(usage.prompt_tokens, output, cached_tokens=rng.randint(0, usage.prompt_tokens))
        for sold in (price, price.at_batch(0.5)):
            assert sold.cost(usage) <= sold.at_most(prompt, output) + 1e-12


@pytest.mark.parametrize("model", ["gemini-2.5-flash", "models/gemini-2.5-flash", "gemini-3-flash-preview"])
def test_known_models_have_a_price_per_token(model: str) -> None:
    price = price_of("gemini", model)
    assert price is not None and price.cached_usd is not None
    assert 1e-9 < price.cached_usd < price.input_usd < price.output_usd < 1e-4


def test_the_tiers_of_the_table_are_known() -> None:
    price = price_of("gemini", "gemini-2.5-pro")
    assert price is not None
    [(above, dearer)] = price.tiers
    assert above == 200_000
    assert dearer.input_usd > price.input_usd and dearer.output_usd > price.output_usd


def test_a_batch_costs_half_but_for_what_is_cached() -> None:
    price, batch = price_of("gemini", "gemini-2.5-flash"), price_of("gemini", "gemini-2.5-flash", batch=True)
    assert price is not None and batch is not None
    assert (batch.input_usd, batch.output_usd) == pytest.approx((price.input_usd / 2, price.output_usd / 2))
    assert batch.cached_usd == price.cached_usd


def test_a_compatible_server_is_known_by_its_address() -> None:
    assert price_of("openai", "gpt-4o-mini", base_url="https://api.openai.com/v1") is not None
    assert price_of("openai", "deepseek-chat", base_url="https://api.deepseek.com/v1") is not None
    assert price_of("openai", "gpt-4o-mini", base_url="https://llm.example.com/v1") is None


@pytest.mark.parametrize(
    ("provider", "model"), [("gemini", "gemini-99-nope"), ("nobody", "gemini-2.5-flash"), ("ollama", "qwen3")]
)
def test_what_is_not_known_has_no_price(provider: str, model: str) -> None:
    assert price_of(provider, model) is None


def test_what_is_not_sold_by_the_token_alone_is_not_known() -> None:
    assert price_of("openai", "sonar", base_url="https://api.perplexity.ai") is None


def test_the_users_own_prices_go_first(mine: Path) -> None:
    address = "https://llm.example.com/v1/"
    assert price_of("openai", "mine", base_url=address, file=mine) == Price(0.5 / 1e6, 2 / 1e6, 0.1 / 1e6)
    assert price_of("openai", "mine", base_url="https://other.example.com", file=mine) is None
    assert price_of("gemini", "gemini-2.5-flash", file=mine) == Price(1 / 1e6, 10 / 1e6)
    batch = price_of("gemini", "gemini-2.5-flash", batch=True, file=mine)
    assert batch is not None and (batch.input_usd, batch.output_usd) == pytest.approx((0.25e-6, 2.5e-6))


def test_a_file_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    assert price_of("gemini", "gemini-2.5-flash", file=tmp_path / PRICES_FILE) == price_of("gemini", "gemini-2.5-flash")


def test_a_mistake_in_the_file_is_named_with_its_line(mine: Path) -> None:
    mine.write_text(MINE.replace("batch ", "bach  "))
    with pytest.raises(ConfigError, match=r'prices.toml:15: unknown key "price.1.bach"') as caught:
        price_of("gemini", "m", file=mine)
    assert caught.value.hint == 'did you mean "batch"?'


def test_an_unknown_price_says_which_lines_to_add_and_they_work(tmp_path: Path) -> None:
    file = tmp_path / PRICES_FILE
    error = unknown_price("cloud", "openai", "new", base_url="https://llm.example.com/v1", file=file)
    assert "lanes.cloud" in str(error) and '"new"' in str(error) and str(file) in error.hint
    lines = [line.strip() for line in error.hint.splitlines()[1:]]
    file.write_text("\n".join(lines).replace("0.00", "0.40"))
    assert price_of("openai", "new", base_url="https://llm.example.com/v1", file=file) == Price(0.4 / 1e6, 0.4 / 1e6)


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
