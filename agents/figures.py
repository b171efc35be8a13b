"""What a display shows of a run. Reading it changes nothing."""

from collections import deque
from dataclasses import dataclass

_WINDOW_S = 10


@dataclass(frozen=True)
class LaneFigures:
    """`closed_by`: why it takes no more work in this run; empty: it does."""

    name: str
    in_flight: int
    limit: int
    ok: int
    errors: int
    closed_by: str


@dataclass(frozen=True)
class Figures:
    """`waiting`: tasks that wait for a lane or a retry. `requests_per_s`: answers, over the last 10 s."""

    lanes: tuple[LaneFigures, ...]
    waiting: int
    requests_per_s: float
    spent_usd: float


class AnswerRate:
    """Answers a second over the last whole seconds; the second that has begun is left out: it would always look slow."""

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque(maxlen=_WINDOW_S + 1)  # [second, answers in it]
        self._first: int | None = None

    def count(self, now: float) -> None:
        second = int(now)
        self._first = second if self._first is None else self._first
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1][1] += 1
        else:
            self._seconds.append([second, 1])

    def per_second(self, now: float) -> float:
        second = int(now)
        if self._first is None or second <= self._first:
            return 0.0
        answers = sum(count for at, count in self._seconds if second - _WINDOW_S <= at < second)
        return answers / min(_WINDOW_S, second - self._first)
