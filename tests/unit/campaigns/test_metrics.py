"""Figures reach a Prometheus scrape and a collector that speaks OTLP over HTTP."""

import gzip
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agents.lanes import Endpoint, Lane
from campaigns import metrics as module
from campaigns.metrics import open_metrics
from campaigns.spec import ObserveSpec
from campaigns.status import Progress
from config.errors import ConfigError, MissingExtra
from tests.fakes.campaign_rows import call, spec
from tests.fakes.fake_provider import FakeProvider
from tests.fakes.ports import free_port
from tests.unit.campaigns.test_live import LANE

WAY = Lane("l", FakeProvider([], name="gemini"), "gemini-x", Endpoint("gemini"))
ANSWER = call(0).model_copy(update={"latency_s": 1.5, "prompt_tokens": 300, "completion_tokens": 40, "time": 1000.0})


def test_nothing_is_observed_unless_asked_for() -> None:
    with open_metrics(ObserveSpec(), "x") as metrics:
        metrics.observe_call(WAY, ANSWER)
        metrics.observe_lanes(Progress(spec()), [LANE])


def test_prometheus_scrapes_calls_tokens_money_and_lanes() -> None:
    port = free_port()
    progress = Progress(spec())
    progress.count(ANSWER)
    with open_metrics(ObserveSpec(prometheus_port=port), "x") as metrics:
        metrics.observe_call(WAY, ANSWER)
        metrics.observe_call(WAY, call(1, "failed"))
        metrics.observe_lanes(progress, [LANE])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        with (
            pytest.raises(ConfigError, match=f"observe.prometheus_port = {port}"),
            open_metrics(ObserveSpec(prometheus_port=port), "y"),
        ):
            pass
    for line in (
        'hafs_calls_total{campaign="x",domain="asm",lane="l",verdict="accepted"} 1.0',
        'hafs_calls_total{campaign="x",domain="asm",lane="l",verdict="failed"} 1.0',
        'hafs_tokens_total{campaign="x",lane="l",type="input"} 300.0',
        'hafs_cost_usd_total{campaign="x",lane="l"} 1.0',
        'hafs_call_seconds_count{campaign="x",lane="l"} 1.0',
        'hafs_lane_in_flight{campaign="x",lane="l"} 2.0',
        'hafs_lane_idle_seconds{campaign="x",lane="l",reason="rate"} 2.0',
        'hafs_accepted_samples{campaign="x",domain="asm"} 1.0',
        'hafs_target_samples{campaign="x"} 9.0',
    ):
        assert line in lines
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


class Collector(HTTPServer):
    """Keeps what an exporter posts, by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[tuple[str, bytes]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_collector_gets_spans_and_histograms_with_the_names_of_the_conventions() -> None:
    with collector() as server:
        with open_metrics(ObserveSpec(otlp_endpoint=f"http://127.0.0.1:{server.server_port}/"), "x") as metrics:
            metrics.observe_call(WAY, ANSWER)
            metrics.observe_call(WAY, call(1, "failed"))
        spans, names = [], set()
        for path, body in server.bodies:
            if path == "/v1/traces":
                found = ExportTraceServiceRequest.FromString(body)
                spans += [span for part in found.resource_spans for scope in part.scope_spans for span in scope.spans]
            else:
                assert path == "/v1/metrics"
                figures = ExportMetricsServiceRequest.FromString(body)
                names |= {m.name for part in figures.resource_metrics for scope in part.scope_metrics for m in scope.metrics}
    assert names == {"gen_ai.client.token.usage", "gen_ai.client.operation.duration"}
    answered, failed = sorted(spans, key=lambda span: span.status.code)
    told = {pair.key: pair.value.string_value or pair.value.int_value for pair in answered.attributes}
    assert answered.name == "chat gemini-x"
    assert answered.end_time_unix_nano - answered.start_time_unix_nano == 1_500_000_000
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "gcp.gemini"
    assert told["gen_ai.request.model"] == "gemini-x"
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (300, 40)
    assert {pair.key: pair.value.string_value for pair in failed.attributes}["error.type"] == "flags"


@pytest.mark.parametrize("asked", [{"prometheus_port": 9}, {"otlp_endpoint": "http://127.0.0.1:9"}])
def test_missing_packages_are_one_clear_line(asked: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prometheus_client", "opentelemetry.exporter.otlp.proto.http.metric_exporter"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra) as caught, open_metrics(ObserveSpec.model_validate(asked), "x"):
        pass
    assert caught.value.hint == 'pip install "hafs[observe]"'


def test_a_collector_that_is_not_there_is_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "EXPORT_S", 0.3)
    with open_metrics(ObserveSpec(otlp_endpoint="http://127.0.0.1:9"), "x") as metrics:
        for number in range(2000):
            metrics.observe_call(WAY, call(number))
    told = [record.getMessage() for record in caplog.records if record.name == "hafs.campaign"]
    assert len(told) == 1 and told[0].startswith("observe the collector: ")
    assert capfd.readouterr().err == ""
