"""Spans against OpenTelemetry's own names and its own decoder; no collector but one on 127.0.0.1."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from evenflow.sampling_params import SamplingParams
from evenflow.server.tracing import ATTRIBUTES, Tracer, make_tracer, request_attributes, response_attributes

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
ASKED = request_attributes("demo", "chat", SamplingParams(max_tokens=32, temperature=0.5, n=2, seed=7, stop=["secret"]))
CAME = response_attributes(
    response_id="chatcmpl-1",
    model="demo",
    finish_reasons=["stop", "length"],
    num_prompt_tokens=12,
    num_output_tokens=40,
    num_cached_tokens=8,
    queue_s=0.01,
    ttft_s=0.1,
    e2e_s=1.5,
)


def one_span(headers, attributes=ASKED | CAME, error=None):
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter)
    tracer.start(headers).finish(attributes, error)
    assert tracer.shutdown()
    (span,) = exporter.get_finished_spans()
    return span


def test_a_request_becomes_one_span_with_exactly_these_attributes():
    span = one_span({})
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "evenflow"
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "evenflow",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 32,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "demo",
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 40,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.latency.time_in_queue": 0.01,
        "gen_ai.latency.time_to_first_token": 0.1,
        "gen_ai.latency.e2e": 1.5,
    }


def test_the_names_are_those_of_the_conventions():
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    deprecated = {"gen_ai.system", "gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens"}
    ours = {name for name in ATTRIBUTES if not name.startswith("gen_ai.latency.")}
    assert ours <= known - deprecated
    assert request_attributes("m", "chat", SamplingParams(top_k=5))["gen_ai.request.top_k"] == 5


def test_a_request_that_never_had_a_token():
    came = response_attributes(
        response_id="1",
        model="demo",
        finish_reasons=["abort"],
        num_prompt_tokens=3,
        num_output_tokens=0,
        num_cached_tokens=0,
        e2e_s=0.5,
    )
    assert "gen_ai.latency.time_to_first_token" not in came
    assert "gen_ai.latency.time_in_queue" not in came
    assert came["gen_ai.usage.output_tokens"] == 0


def test_the_parent_comes_from_the_headers():
    span = one_span(SAMPLED)
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert span.parent.is_remote
    assert span.context.trace_state["vendor"] == "1"


@pytest.mark.parametrize(
    "traceparent", ["", "garbage", f"00-{'0' * 32}-{PARENT_ID}-01", f"ff-{TRACE_ID}-{PARENT_ID}-01"]
)
def test_a_bad_parent_starts_a_new_trace(traceparent):
    span = one_span({"traceparent": traceparent})
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" != TRACE_ID


def test_a_parent_that_is_not_sampled_is_obeyed():
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter)
    tracer.start({"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}).finish(ASKED)
    assert tracer.shutdown()
    assert exporter.get_finished_spans() == ()


def test_an_error_has_a_kind_and_no_message():
    span = one_span({}, ASKED, error="engine_error")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert span.attributes["error.type"] == "engine_error"
    assert span.events == ()


@pytest.mark.parametrize("name", ["gen_ai.prompt", "gen_ai.input.messages", "gen_ai.output.messages", "text"])
def test_content_is_refused(name):
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter)
    with pytest.raises(ValueError, match=name):
        tracer.start({}).finish({name: "what the user wrote"})
    assert tracer.shutdown()
    (span,) = exporter.get_finished_spans()
    assert dict(span.attributes) == {}


def test_stop_strings_are_content_too():
    assert "secret" not in str(ASKED)


class Stuck(SpanExporter):
    def __init__(self):
        self.release = threading.Event()

    def export(self, spans):
        self.release.wait()
        return SpanExportResult.SUCCESS


def test_a_stuck_collector_delays_neither_requests_nor_the_end(caplog):
    exporter = Stuck()
    tracer = Tracer(exporter)
    for _ in range(3000):  # more than the queue holds
        tracer.start({}).finish(ASKED)
    assert not tracer.shutdown(timeout_s=0.01)
    assert "not delivered within 0.01 s" in caplog.text
    exporter.release.set()


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def collector():
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.received = []
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "expected"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/tenant/traces", "/tenant/traces")]
)
def test_spans_travel_over_http(collector, path, expected):
    tracer = make_tracer(f"http://127.0.0.1:{collector.server_port}{path}")
    tracer.start(SAMPLED).finish(ASKED | CAME)
    assert collector.received == []  # batched, not sent by the caller
    assert tracer.shutdown()
    ((received_path, request),) = collector.received
    assert received_path == expected
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE_ID, PARENT_ID)


def test_no_endpoint_no_tracer():
    assert make_tracer(None) is None


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "grpc://localhost:4317", "http://"])
def test_what_is_no_endpoint(endpoint):
    with pytest.raises(ValueError, match="otlp_endpoint=.* must be a URL"):
        make_tracer(endpoint)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r'pip install "evenflow\[otel\]"'):
        make_tracer("http://localhost:4318")
