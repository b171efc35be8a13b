"""Figures for monitoring: a Prometheus endpoint on this machine, OpenTelemetry to a collector. Both are optional.

Names of OpenTelemetry are those of its semantic conventions for generative AI (gen_ai.*). Prompts and answers are never sent.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from agents.lanes import Lane, LaneView
from campaigns.logs import one_line
from campaigns.spec import ObserveSpec
from campaigns.status import Progress
from campaigns.store import Call
from config.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from prometheus_client import CollectorRegistry

log = logging.getLogger("hafs.campaign")
EXTRA_HINT = 'pip install "hafs[observe]"'
EXPORT_S = 5.0  # how long a collector may take, also at the end of a campaign
LATENCY_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)  # bounds of the histogram


class Observer(Protocol):
    """Somebody who is told of every call, and of the lanes about once a second."""

    def observe_call(self, lane: Lane, call: Call) -> None: ...

    def observe_lanes(self, progress: Progress, lanes: Sequence[LaneView]) -> None: ...


class Metrics:
    """All observers of a campaign; none as a rule."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = observers

    def observe_call(self, lane: Lane, call: Call) -> None:
        for observer in self._observers:
            observer.observe_call(lane, call)

    def observe_lanes(self, progress: Progress, lanes: Sequence[LaneView]) -> None:
        for observer in self._observers:
            observer.observe_lanes(progress, lanes)


@contextmanager
def open_metrics(spec: ObserveSpec, campaign: str) -> Iterator[Metrics]:
    """What `[observe]` asks for, as long as the block lasts.

    Raises:
        MissingExtra: the packages are not installed.
        ConfigError: the port is taken.
    """
    observers: list[Observer] = []
    with ExitStack() as stack:
        try:
            if spec.prometheus_port is not None:
                observers.append(stack.enter_context(_prometheus(spec.prometheus_port, campaign)))
            if spec.otlp_endpoint:
                observers.append(stack.enter_context(_opentelemetry(spec.otlp_endpoint, campaign)))
        except ModuleNotFoundError as error:
            raise MissingExtra(f"[observe] needs the package {error.name}, which is not installed", hint=EXTRA_HINT) from error
        yield Metrics(observers)


# prometheus ------------------------------------------------------------------------------------------------------------


@contextmanager
def _prometheus(port: int, campaign: str) -> Iterator[Observer]:
    """Serve http://127.0.0.1:PORT/metrics from a thread of its own; other machines do not reach it."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    observer = _Prometheus(registry, campaign)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigError(
            f"observe.prometheus_port = {port}: {error.strerror}", hint="another campaign may serve there: give each its own port"
        ) from error
    try:
        yield observer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Prometheus:
    def __init__(self, registry: "CollectorRegistry", campaign: str) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._campaign = campaign
        by_lane = ("campaign", "lane")
        self._calls = Counter("hafs_calls", "Calls that ended.", (*by_lane, "domain", "verdict"), registry=registry)
        self._tokens = Counter("hafs_tokens", "Tokens, input and output.", (*by_lane, "type"), registry=registry)
        self._cost = Counter("hafs_cost_usd", "Money spent, in USD.", by_lane, registry=registry)
        self._latency = Histogram("hafs_call_seconds", "Latency of answers.", by_lane, buckets=LATENCY_S, registry=registry)
        self._in_flight = Gauge("hafs_lane_in_flight", "Calls that run.", by_lane, registry=registry)
        self._limit = Gauge("hafs_lane_limit", "Calls the lane may run at once.", by_lane, registry=registry)
        self._idle = Gauge("hafs_lane_idle_seconds", "Time with a free slot, by reason.", (*by_lane, "reason"), registry=registry)
        self._accepted = Gauge("hafs_accepted_samples", "Samples accepted so far.", ("campaign", "domain"), registry=registry)
        self._target = Gauge("hafs_target_samples", "Samples wanted.", ("campaign",), registry=registry)

    def observe_call(self, lane: Lane, call: Call) -> None:
        self._calls.labels(self._campaign, lane.name, call.domain, call.verdict).inc()
        self._tokens.labels(self._campaign, lane.name, "input").inc(call.prompt_tokens)
        self._tokens.labels(self._campaign, lane.name, "output").inc(call.completion_tokens)
        self._cost.labels(self._campaign, lane.name).inc(call.cost_usd)
        if call.verdict != "failed":
            self._latency.labels(self._campaign, lane.name).observe(call.latency_s)

    def observe_lanes(self, progress: Progress, lanes: Sequence[LaneView]) -> None:
        self._target.labels(self._campaign).set(progress.spec.target)
        for domain in progress.spec.domains:
            self._accepted.labels(self._campaign, domain).set(progress.accepted[domain])
        for lane in lanes:
            self._in_flight.labels(self._campaign, lane.name).set(lane.in_flight)
            self._limit.labels(self._campaign, lane.name).set(lane.limit)
            for reason, seconds in lane.idle_s.items():
                self._idle.labels(self._campaign, lane.name, reason).set(seconds)


# opentelemetry ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opentelemetry(endpoint: str, campaign: str) -> Iterator[Observer]:
    """Send to a collector over OTLP/HTTP (http://127.0.0.1:4318), in batches, from threads of the SDK."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    base = endpoint.rstrip("/")
    resource = Resource.create({"service.name": "hafs", "hafs.campaign": campaign})
    spans = OTLPSpanExporter(f"{base}/v1/traces", timeout=EXPORT_S)
    figures = OTLPMetricExporter(f"{base}/v1/metrics", timeout=EXPORT_S)
    traces = TracerProvider(resource=resource, shutdown_on_exit=False)
    traces.add_span_processor(BatchSpanProcessor(spans))
    reader = PeriodicExportingMetricReader(figures, export_timeout_millis=1000 * EXPORT_S)
    meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)

    exporters: list[Callable[[], None]] = [spans.shutdown, figures.shutdown]

    def give_up() -> None:
        for shut_down in exporters:
            shut_down()

    with _first_trouble_logged():
        try:
            yield _OpenTelemetry(traces, meters)
        finally:
            patience = threading.Timer(EXPORT_S, give_up)  # the SDK would try each batch anew
            patience.start()
            traces.shutdown()
            meters.shutdown()
            patience.cancel()


@contextmanager
def _first_trouble_logged() -> Iterator[None]:
    """The SDK complains of every batch: one line in the campaign's log will do, and none in the terminal."""
    sdk = logging.getLogger("opentelemetry")
    handler = _FirstOnly(logging.WARNING)
    sdk.addHandler(handler)
    sdk.propagate = False
    try:
        yield
    finally:
        sdk.removeHandler(handler)
        sdk.propagate = True


class _FirstOnly(logging.Handler):
    _told = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._told:
            self._told = True
            log.warning("observe the collector: %s", one_line(record.getMessage()))


class _OpenTelemetry:
    def __init__(self, traces: "TracerProvider", meters: "MeterProvider") -> None:
        self._tracer = traces.get_tracer("hafs")
        meter = meters.get_meter("hafs")
        self._tokens = meter.create_histogram("gen_ai.client.token.usage", "{token}", "Tokens of a call.")
        self._duration = meter.create_histogram("gen_ai.client.operation.duration", "s", "Duration of a call.")

    def observe_call(self, lane: Lane, call: Call) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end_s = call.time or time.time()
        shared = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": {"gemini": "gcp.gemini"}.get(lane.provider.name, lane.provider.name),
            "gen_ai.request.model": lane.model,
        }
        span = self._tracer.start_span(
            f"chat {lane.model}",
            kind=SpanKind.CLIENT,
            start_time=int((end_s - call.latency_s) * 1e9),
            attributes={
                **shared,
                "gen_ai.response.model": call.model or lane.model,
                "gen_ai.usage.input_tokens": call.prompt_tokens,
                "gen_ai.usage.output_tokens": call.completion_tokens,
                "hafs.lane": lane.name,
                "hafs.domain": call.domain,
                "hafs.verdict": call.verdict,
                "hafs.reason": call.reason,
                "hafs.cost_usd": call.cost_usd,
            },
        )
        if call.verdict == "failed":
            span.set_attribute("error.type", call.reason)
            span.set_status(Status(StatusCode.ERROR, call.reason))
        span.end(int(end_s * 1e9))
        if call.verdict == "failed":  # nobody knows how long it took, nor what it read
            return
        self._duration.record(call.latency_s, shared)
        self._tokens.record(call.prompt_tokens, {**shared, "gen_ai.token.type": "input"})
        self._tokens.record(call.completion_tokens, {**shared, "gen_ai.token.type": "output"})

    def observe_lanes(self, progress: Progress, lanes: Sequence[LaneView]) -> None:
        """Spans and histograms say it all."""
