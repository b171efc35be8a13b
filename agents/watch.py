"""What goes on beside a run: the GPU's load is read, and the other processes at an endpoint are counted."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import anyio

from agents.endpoints import EndpointState
from agents.rates import Participants

GPU_EVERY_S = 2.0
COUNT_EVERY_S = 1.0


def watchers(
    endpoints: Sequence[EndpointState], clock: Callable[[], float], wake: Callable[[], None]
) -> list[Callable[[], Awaitable[None]]]:
    """What has to run until it is cancelled: each keeps what an endpoint knows of others up to date, and calls `wake` when that
    changes. The second kind raises StoreError where the shared folder cannot be written.
    """
    gpus = [partial(_watch_gpu, endpoint, clock, wake) for endpoint in endpoints if endpoint.gpu]
    return [*gpus, *(partial(_watch_sharers, endpoint, wake) for endpoint in endpoints if endpoint.spec.shared)]


async def _watch_gpu(endpoint: EndpointState, clock: Callable[[], float], wake: Callable[[], None]) -> None:
    assert endpoint.gpu and endpoint.spec.gpu
    while True:
        reading = await endpoint.spec.gpu.telemetry.read()
        endpoint.gpu.take(clock(), reading, endpoint.in_flight)
        wake()
        await anyio.sleep(GPU_EVERY_S)


async def _watch_sharers(endpoint: EndpointState, wake: Callable[[], None]) -> None:
    assert endpoint.spec.shared
    with Participants(endpoint.spec.shared / "users") as participants:
        while True:
            sharers = max(1, participants.count())
            if sharers != endpoint.sharers:
                endpoint.sharers = sharers
                wake()
            await anyio.sleep(COUNT_EVERY_S)
