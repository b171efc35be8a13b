"""Waiting for something new to tell: a question over the wire may stay open until there is."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def await_news(look: Callable[[], T], is_news: Callable[[T], bool], wait_s: float) -> T:
    """What `look` returns once that is news, or after `wait_s` seconds whatever it returns then."""
    from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_exponential

    def last(state: RetryCallState) -> T:
        assert state.outcome is not None
        seen: T = state.outcome.result()
        return seen

    patience = Retrying(
        retry=retry_if_result(lambda seen: not is_news(seen)),
        stop=stop_after_delay(wait_s),
        wait=wait_exponential(multiplier=0.02, max=0.2),
        retry_error_callback=last,
    )
    return patience(look)
