"""The budget of a campaign. Spent and reserved together never exceed the maximum.

A paid call is reserved at its worst case before it is sent, and settled when it ends: on the usage it reports, or, where it
ends without usage (timeout, dropped connection, cancelled), at its reservation, marked as assumed. Worst cases are many times the
true costs: near the maximum a call that does not fit may still fit once the calls in flight are settled (`outstanding`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agents import tokens
from agents.prices import Price
from agents.task import Sampling, Usage
from config.contracts.sample import Message
from config.errors import BudgetExceeded


@dataclass(frozen=True)
class Reservation:
    """Money held back for one call. `price` None: nobody knows what it costs (allowed only without a maximum)."""

    price: Price | None
    usd: float


@dataclass(frozen=True)
class Cost:
    """What a call is taken to have cost. `assumed`: nobody reported it."""

    usd: float
    assumed: bool


class Budget:
    """Money in USD; `max_usd` None: no limit. `spent_usd` is what earlier runs of the campaign have spent."""

    def __init__(self, max_usd: float | None, spent_usd: float = 0.0) -> None:
        self.max_usd = max_usd
        self.spent_usd = spent_usd
        self.reserved_usd = 0.0
        self._held: set[int] = set()

    @property
    def outstanding(self) -> int:
        """Calls that are reserved and not yet settled: settling them may free money."""
        return len(self._held)

    def reserve(
        self, price: Price | None, messages: Sequence[Message], sampling: Sampling, thinking_tokens: int = 0
    ) -> Reservation:
        """Hold back the worst case of a call: `worst_case`.

        Args:
            thinking_tokens: most of them that may come on top of `max_tokens` (tokens.thinking_at_most).

        Raises:
            BudgetExceeded: it does not fit; nothing is held back.
        """
        usd = 0.0 if price is None else worst_case(price, messages, sampling, thinking_tokens)
        if self.max_usd is not None and self.spent_usd + self.reserved_usd + usd > self.max_usd:
            raise BudgetExceeded(
                f"the budget of ${self.max_usd:g} is met: ${self.spent_usd:.4f} spent, the next call may cost ${usd:.4f}",
                hint="raise max_usd under [budget] and run the same command again: it continues",
            )
        reservation = Reservation(price, usd)
        self._held.add(id(reservation))
        self.reserved_usd += usd
        return reservation

    def settle(self, reservation: Reservation, usage: Usage | None) -> Cost:
        """Turn a reservation into money spent. Without usage (None, or no token counted) the worst case is assumed."""
        self.release(reservation)
        if reservation.price is None:
            return Cost(0.0, assumed=True)
        if usage is None or usage == Usage():
            cost = Cost(reservation.usd, assumed=True)
        else:
            cost = Cost(reservation.price.cost(usage), assumed=False)
        self.spent_usd += cost.usd
        return cost

    def release(self, reservation: Reservation) -> None:
        """Give a reservation back: the server refused the call or was never reached, so nothing is owed."""
        self._held.remove(id(reservation))
        # A sum that goes up and down keeps rounding errors; with nothing held it is 0.
        self.reserved_usd = self.reserved_usd - reservation.usd if self._held else 0.0


def worst_case(price: Price, messages: Sequence[Message], sampling: Sampling, thinking_tokens: int = 0) -> float:
    """USD that a call surely does not exceed: the most tokens its prompt can have, and a whole answer of `max_tokens`."""
    return price.at_most(tokens.at_most(messages, sampling.schema), sampling.max_tokens + thinking_tokens)
