"""The feed of what happened to the jobs: append-only, numbered. Who asks with the last number it has misses nothing."""

from config.contracts.wire import EventsArgs, EventsResult
from trainer_node.queue import Queue


def read_events(queue: Queue, args: EventsArgs) -> EventsResult:
    """The events after `args.after`; waits for one up to `args.wait_s`."""
    from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_exponential

    def nothing_new(seen: EventsResult) -> bool:
        return not seen.events

    def last(state: RetryCallState) -> EventsResult:
        assert state.outcome is not None
        seen: EventsResult = state.outcome.result()
        return seen

    patience = Retrying(
        retry=retry_if_result(nothing_new),
        stop=stop_after_delay(args.wait_s),
        wait=wait_exponential(multiplier=0.02, max=0.2),
        retry_error_callback=last,
    )
    return patience(_events_now, queue, args.after)


def _events_now(queue: Queue, after: int) -> EventsResult:
    events = queue.events(after=after)
    return EventsResult(events=events, next=events[-1].seq if events else after)
