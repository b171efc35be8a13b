"""What a token costs. An unknown price is None, never 0: only a provider on the user's own machines is free.

The price table ships with the package genai-prices; nothing is fetched. Prices are those of the first tier, which a prompt
leaves at 200,000 tokens. Cached prompt tokens are counted at the full price, thinking tokens as output.
"""

from dataclasses import dataclass

from agents.task import Usage
from config.errors import MissingExtra

OWN_MACHINES = frozenset({"ollama"})  # providers that cost nothing but power


@dataclass(frozen=True)
class Price:
    """USD per token."""

    input_usd: float
    output_usd: float

    def cost(self, usage: Usage) -> float:
        """USD of a call that has ended."""
        return usage.prompt_tokens * self.input_usd + (usage.completion_tokens + usage.thinking_tokens) * self.output_usd


def price_of(provider: str, model: str) -> Price | None:
    """The list price of a model today; None where it is not known.

    Raises:
        MissingExtra: the price table is not installed.
    """
    if provider in OWN_MACHINES:
        return None
    try:
        import genai_prices
    except ImportError as error:
        raise MissingExtra("the price table (genai-prices) is not installed", hint='pip install "hafs[laptop]"') from error
    name = model.removeprefix("models/")
    try:
        input_usd = genai_prices.calc_price(genai_prices.Usage(input_tokens=1), name, provider_id=provider).total_price
        output_usd = genai_prices.calc_price(genai_prices.Usage(output_tokens=1), name, provider_id=provider).total_price
    except LookupError:
        return None
    # A zero is a gap of the table (a free tier, a model priced by the picture), not a gift.
    return Price(float(input_usd), float(output_usd)) if input_usd and output_usd else None
