"""Circuit breaker of an endpoint: a server that does not answer is left alone for a while, then tried without spending a task.

- Five calls in a row without an answer open it; it stays open 1 s, then twice as long each time, up to `longest_s`.
- After that the server is probed (a free request); if it is there, one call is let through, and its answer closes the breaker.
- Calls that were in flight when it opened do not open it again.
"""

import math

FAILURES_TO_OPEN = 5
_FIRST_WAIT_S = 1.0


class Breaker:
    """`longest_s`: the longest wait between two tries. Times are seconds of the caller's clock."""

    def __init__(self, longest_s: float) -> None:
        self.opens_at = -math.inf
        self._longest_s = longest_s
        self._wait_s = _FIRST_WAIT_S
        self._failures = 0
        self._opened_at = -math.inf
        self._probe: str = ""  # "found": one call may try the server; "trying": it does

    @property
    def down(self) -> bool:
        return self._failures >= FAILURES_TO_OPEN

    @property
    def admits(self) -> bool:
        return not self.down or self._probe == "found"

    def wants_probe(self, now: float) -> bool:
        return self.down and not self._probe and now >= self.opens_at

    def started(self) -> None:
        if self.down:
            self._probe = "trying"

    def answered(self) -> None:
        """It answers, be it with a refusal."""
        self._failures = 0
        self._wait_s = _FIRST_WAIT_S
        self._probe = ""

    def failed(self, now: float, started: float) -> bool:
        """A call or probe that started then got no answer. True: this opened the breaker."""
        if self.down and started < self._opened_at:
            return False
        self._failures += 1
        if not self.down:
            return False
        self._probe = ""
        self._opened_at = now
        self.opens_at = now + self._wait_s
        self._wait_s = min(self._longest_s, 2 * self._wait_s)
        return self._failures == FAILURES_TO_OPEN

    def found(self) -> None:
        """The probe was answered."""
        self._probe = "found"

    def left(self, started: float) -> None:
        """A call that started then was cancelled: where it was the one that tries, another may."""
        if self._probe == "trying" and started >= self._opened_at:
            self._probe = "found"
