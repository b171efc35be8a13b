"""Batches that were given up and answered after all: each is billed, and becomes one line of calls.jsonl: no money is lost."""

import time
from collections.abc import Awaitable, Callable, Mapping

from agents.lanes import Lane
from campaigns.store import Call


async def book_late_bills(lanes: Mapping[str, Lane], domain: str, book: Callable[[Call], Awaitable[None]]) -> None:
    """Book what is known to be billed late, when no task runs any more. `domain` is the one that the lines are filed under."""
    from agents.providers.gemini_batch import BatchProvider, LateBill

    def call_of(lane: Lane, bill: LateBill) -> Call:
        return Call(
            task_id=bill.display_name,
            domain=domain,
            cell="",
            number=0,
            verdict="failed",
            reason="billed_late",
            detail=f"{bill.requests} requests of a batch that was given up were answered and billed after all",
            lane=lane.name,
            provider=lane.provider.name,
            model=bill.model,
            prompt_tokens=bill.usage.prompt_tokens,
            completion_tokens=bill.usage.completion_tokens,
            thinking_tokens=bill.usage.thinking_tokens,
            cost_usd=lane.price.cost(bill.usage) if lane.price else 0.0,
            time=time.time(),
        )

    for lane in lanes.values():
        if isinstance(lane.provider, BatchProvider):
            for bill in await lane.provider.late_bills():
                await book(call_of(lane, bill))
                await lane.provider.billed(bill)
