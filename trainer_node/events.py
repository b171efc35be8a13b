"""The feed of what happened to the jobs: append-only, numbered. Who asks with the last number it has misses nothing."""

from config.contracts.wire import EventsArgs, EventsResult
from trainer_node.news import await_news
from trainer_node.queue import Queue


def read_events(queue: Queue, args: EventsArgs) -> EventsResult:
    """The events after `args.after`; waits for one up to `args.wait_s`."""
    return await_news(lambda: _events_now(queue, args.after), lambda seen: bool(seen.events), args.wait_s)


def _events_now(queue: Queue, after: int) -> EventsResult:
    events = queue.events(after=after)
    return EventsResult(events=events, next=events[-1].seq if events else after)
