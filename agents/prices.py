"""What a token costs. An unknown price is None, never 0: what runs on the user's own machines has no price at all.

- The user's own file (HAFS_HOME/prices.toml) goes before the price table, which ships with the package genai-prices; nothing is
  fetched. What a model costs now is looked up once, when its lane is opened.
- A price that changes with the hour counts at its dearest hour.
- A prompt over a threshold (200,000 tokens) makes the whole call dearer: `cost` takes the tier of the true prompt,
  `at_most` the dearest tier that the prompt can reach.
- Thinking is paid as output. Cached prompt tokens have a price of their own, in batch mode too, where the rest is at half price.
"""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from agents.task import Usage
from config.contracts.base import Strict
from config.errors import ConfigError, MissingExtra
from config.toml import load_toml

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice, PriceCalculation

BATCH_FACTOR = 0.5
PRICES_FILE = "prices.toml"
_MILLION = 1e6
_SOLD_OTHERWISE = ("requests_kcount", "output_reasoning_mtok", "output_citation_mtok", "input_text_messages_kcount")


@dataclass(frozen=True)
class Price:
    """USD per token. `cached_usd` None: cached prompt tokens cost what others cost. `tiers`: (tokens, price) of prompts that have
    more tokens than that, ascending.
    """

    input_usd: float
    output_usd: float
    cached_usd: float | None = None
    tiers: tuple[tuple[int, "Price"], ...] = ()

    def cost(self, usage: Usage) -> float:
        """USD of a call that has ended."""
        tier = next((price for above, price in reversed(self.tiers) if usage.prompt_tokens > above), self)
        cached_usd = tier.input_usd if tier.cached_usd is None else tier.cached_usd
        prompt_usd = (usage.prompt_tokens - usage.cached_tokens) * tier.input_usd + usage.cached_tokens * cached_usd
        return prompt_usd + (usage.completion_tokens + usage.thinking_tokens) * tier.output_usd

    def at_most(self, prompt_tokens: int, output_tokens: int) -> float:
        """USD that a call with no more tokens than these surely does not exceed."""
        reachable = [self, *(price for above, price in self.tiers if prompt_tokens > above)]
        return max(
            prompt_tokens * max(tier.input_usd, tier.cached_usd or 0.0) + output_tokens * tier.output_usd for tier in reachable
        )

    def at_batch(self, factor: float) -> "Price":
        """In batch mode. What is cached is not discounted twice."""
        tiers = tuple((above, price.at_batch(factor)) for above, price in self.tiers)
        cached_usd = self.input_usd if self.cached_usd is None else self.cached_usd
        input_usd = self.input_usd * factor
        return Price(input_usd, self.output_usd * factor, min(cached_usd, input_usd), tiers)


class PriceEntry(Strict):
    """One [[price]] of the user's file. `input`, `output` and `cached` (cached prompt tokens; absent: as input) are in USD per
    million tokens, `batch` is the factor in batch mode. `base_url` empty: every server of that provider.
    """

    provider: Literal["ollama", "gemini", "openai"]
    base_url: str = ""
    model: str
    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached: float | None = Field(None, ge=0)
    batch: float = Field(BATCH_FACTOR, gt=0, le=1)

    def price(self) -> Price:
        cached_usd = None if self.cached is None else self.cached / _MILLION
        return Price(self.input / _MILLION, self.output / _MILLION, cached_usd)


class PricesFile(Strict):
    """The user's file; of several entries for one model the first counts."""

    price: list[PriceEntry] = []


def price_of(provider: str, model: str, *, base_url: str = "", batch: bool = False, file: Path | None = None) -> Price | None:
    """What a model costs today, None where it is not known. For lanes on the user's own machines it need not be asked.

    Args:
        base_url: of an OpenAI-compatible server: tells whose model it is.
        file: the user's prices; it need not exist.

    Raises:
        ConfigError: the user's file is wrong (file, line, key).
        MissingExtra: the price table is not installed.
    """
    entries = load_toml(file, PricesFile).price if file and file.exists() else []
    for entry in entries:
        if (entry.provider, entry.model) == (provider, model) and entry.base_url.rstrip("/") in ("", base_url.rstrip("/")):
            return entry.price().at_batch(entry.batch) if batch else entry.price()
    return _list_price(provider, model.removeprefix("models/"), base_url, batch)


def unknown_price(lane: str, provider: str, model: str, *, base_url: str = "", file: Path) -> ConfigError:
    """The error of a lane whose price has to be known, because the campaign has a limit; it says which lines to add where."""
    lines = [
        "[[price]]",
        f"provider = {json.dumps(provider)}",
        *([f"base_url = {json.dumps(base_url)}"] if base_url else []),
        f"model    = {json.dumps(model)}",
        "input    = 0.00   # USD per million prompt tokens",
        "output   = 0.00   # USD per million tokens of answers and thinking",
    ]
    return ConfigError(
        f'lanes.{lane}: the price of "{model}" is not known, so max_usd cannot be kept',
        hint="\n  ".join([f"add to {file} (or remove max_usd to run without a limit):", *lines]),
    )


def _list_price(provider: str, model: str, base_url: str, batch: bool) -> Price | None:
    """What the price table says, at the dearest hour of today."""
    prices = [
        _price(found) for hour in range(24) if (found := _look_up(provider, model, base_url, hour, batch=batch)) is not None
    ]
    known = [price for price in prices if price is not None]
    if not known or len(known) < len(prices):
        return None
    dearest = max(known, key=lambda price: (price.output_usd, price.input_usd))
    if not batch:
        return dearest
    standard = _list_price(provider, model, base_url, batch=False)
    if standard is None or (dearest.input_usd, dearest.output_usd) != (standard.input_usd, standard.output_usd):
        return dearest
    return standard.at_batch(BATCH_FACTOR)  # the table has no price of its own for batches


def _look_up(provider: str, model: str, base_url: str, hour: int, *, batch: bool) -> "PriceCalculation | None":
    try:
        import genai_prices
    except ImportError as error:
        raise MissingExtra("the price table (genai-prices) is not installed", hint='pip install "hafs[laptop]"') from error
    usage, at = genai_prices.Usage(input_tokens=1), datetime.now(UTC).replace(hour=hour)
    context = {"processing": "batch"} if batch else None
    by_url = partial(genai_prices.calc_price, provider_api_url=base_url)
    by_name = partial(genai_prices.calc_price, provider_id=provider)
    try:
        return (by_url if base_url and provider == "openai" else by_name)(
            usage, model, genai_request_timestamp=at, price_context=context
        )
    except LookupError:
        return None


def _price(found: "PriceCalculation") -> Price | None:
    listed = found.model_price
    if any(getattr(listed, key) for key in _SOLD_OTHERWISE):
        return None  # tokens are not all that is paid
    base = _tier(listed, 0)
    starts = {tier.start for value in vars(listed).values() for tier in getattr(value, "tiers", [])}
    tiers = [(start, _tier(listed, start + 1)) for start in sorted(starts)]
    # A zero is a gap of the table (a free tier, a model priced by the picture), not a gift.
    if not base.input_usd or not base.output_usd:
        return None
    return replace(base, tiers=tuple(tiers))


def _tier(listed: "ModelPrice", prompt_tokens: int) -> Price:
    """USD per token of a prompt of that size."""

    def rate(key: str) -> float | None:
        value = getattr(listed, key)
        passed = [tier.price for tier in getattr(value, "tiers", []) if prompt_tokens > tier.start]
        chosen = passed[-1] if passed else getattr(value, "base", value)
        return None if chosen is None else float(chosen) / _MILLION

    return Price(rate("input_mtok") or 0.0, rate("output_mtok") or 0.0, rate("cache_read_mtok"))
