"""Whose turn it is, where one server holds one model at a time: requests are grouped by model, so that it swaps seldom.

- Only the lane whose turn it is may start calls; the next one starts when the server has nothing in flight.
- A turn ends when its lane finds no work, when its share of what is left is done, or after a while if others wait.
- A turn is long against what a swap costs: the swap's measured time, times LEAST_TURN_SWAPS, is the least it lasts.
- The rotation goes back and forth (a b, b a, …): its ends need no swap.
"""

import math
from collections.abc import Sequence

LEAST_TURN_SWAPS = 5
_LONGEST_TURN_SWAPS = 20
_SHORTEST_CAP_S = 60.0
_UNKNOWN_SWAP_S = 5.0


class Turns:
    """Turns of the lanes (by name) of one server. Times are seconds of the caller's clock."""

    def __init__(self, lanes: Sequence[str]) -> None:
        self.current = ""
        self.swaps = 0
        self._loaded = ""  # the lane of the last call: the server holds its model
        self.lanes = list(lanes)
        self._order = list(lanes)  # who still has a turn in this rotation, the current one first
        self._since = 0.0
        self._served = 0
        self._share = math.inf
        self._over = True
        self._swap_s = _UNKNOWN_SWAP_S
        self._loading_since: float | None = None

    def allows(self, lane: str) -> bool:
        return lane == self.current and not self._over

    def refresh(self, now: float, in_flight: int, remaining: int, call_s: float, able: Sequence[str]) -> None:
        """Look whether the turn is over and, if the server is idle, begin the next one.

        Args:
            remaining: tasks that are still to be handed out.
            call_s: seconds between two answers of the server.
            able: lanes that are not closed.
        """
        if not self._over:
            least = LEAST_TURN_SWAPS * self._swap_s / max(call_s, 1e-3)
            longest_s = max(_SHORTEST_CAP_S, _LONGEST_TURN_SWAPS * self._swap_s)
            done = self._served >= max(self._share, least) or now - self._since >= longest_s
            self._over = self.current not in able or (done and len(able) > 1)
        if self._over and in_flight == 0 and able:
            self._begin(now, remaining, able)

    def started(self, lane: str, now: float) -> bool:
        """A call has started. True: the server has to load another model for it."""
        self._served += 1
        if lane == self._loaded:
            return False
        self._loaded = lane
        self._loading_since = now
        self.swaps += 1
        return True

    def answered(self, now: float, typical_s: float) -> None:
        """The first answer after a swap shows what it cost: the time above a typical answer."""
        if self._loading_since is None:
            return
        measured_s = max(0.1, now - self._loading_since - typical_s)
        self._swap_s = measured_s if self.swaps == 1 else (self._swap_s + measured_s) / 2
        self._loading_since = None

    def starved(self) -> None:
        """The lane whose turn it is found nothing to do."""
        self._over = True

    def _begin(self, now: float, remaining: int, able: Sequence[str]) -> None:
        order = [lane for lane in self._order if lane in able and lane != self.current]
        if not order:
            self.lanes.reverse()
            order = [lane for lane in self.lanes if lane in able]
        self.current, self._order = order[0], order
        self._since, self._served, self._over = now, 0, False
        self._share = math.ceil(remaining / len(order))
