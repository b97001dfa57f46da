"""Optional traces: one OpenTelemetry span a request, sent over OTLP/HTTP by a thread of its own.

Owns the span's attributes: a closed list, so that no prompt and no output can get into a span. OpenTelemetry is
imported when tracing is asked for, and only then; its standard environment variables (OTEL_EXPORTER_OTLP_HEADERS,
OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, ...) hold. Its global state is not touched.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from evenflow import __version__
from evenflow.sampling_params import SamplingParams

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

logger = logging.getLogger("evenflow")

AttributeValue = str | int | float | Sequence[str]

# From OpenTelemetry's conventions for generative AI, but for gen_ai.latency.*: they have none; these are vLLM's.
ATTRIBUTES = frozenset(
    {
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "gen_ai.request.max_tokens",
        "gen_ai.request.temperature",
        "gen_ai.request.top_p",
        "gen_ai.request.top_k",
        "gen_ai.request.choice.count",
        "gen_ai.request.seed",
        "gen_ai.response.id",
        "gen_ai.response.model",
        "gen_ai.response.finish_reasons",
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.output_tokens",
        "gen_ai.usage.cache_read.input_tokens",
        "gen_ai.latency.time_in_queue",
        "gen_ai.latency.time_to_first_token",
        "gen_ai.latency.e2e",
    }
)


def request_attributes(model: str, operation: str, params: SamplingParams) -> dict[str, AttributeValue]:
    """What was asked. model: the name that is served; operation: "chat" or "text_completion"."""
    asked: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "evenflow",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.request.seed": params.seed,
    }
    return _without_none(asked)


def response_attributes(
    *,
    response_id: str,
    model: str,
    finish_reasons: Sequence[str],
    num_prompt_tokens: int,
    num_output_tokens: int,
    num_cached_tokens: int,
    e2e_s: float,
    queue_s: float | None = None,
    ttft_s: float | None = None,
) -> dict[str, AttributeValue]:
    """What came of it. finish_reasons: one per completion; num_output_tokens: of all completions; None: never came."""
    came: dict[str, AttributeValue | None] = {
        "gen_ai.response.id": response_id,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": finish_reasons,
        "gen_ai.usage.input_tokens": num_prompt_tokens,
        "gen_ai.usage.output_tokens": num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": num_cached_tokens,
        "gen_ai.latency.time_in_queue": queue_s,
        "gen_ai.latency.time_to_first_token": ttft_s,
        "gen_ai.latency.e2e": e2e_s,
    }
    return _without_none(came)


def _without_none(values: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in values.items() if value is not None}


class RequestSpan:
    """One request in flight. Finish it once, however the request ends."""

    def __init__(self, span: "Span") -> None:
        self._span = span

    def finish(self, attributes: Mapping[str, AttributeValue], error: str | None = None) -> None:
        """End the span now and queue it; never waits. ValueError if an attribute is not one of ATTRIBUTES.

        error: the kind of failure ("500", "engine_error"), not a message: messages may quote what a user wrote.
        """
        from opentelemetry.trace import Status, StatusCode

        unknown = sorted(attributes.keys() - ATTRIBUTES)
        if unknown:
            self._span.end()
            raise ValueError(
                f"span attribute {unknown[0]!r} is not one of ours; add it to ATTRIBUTES if it is no content"
            )
        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Tracer:
    """Makes the spans. Finished ones wait in a bounded queue, from which a thread exports; when full, it drops."""

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource({"service.name": "evenflow", "service.version": __version__})
        named = resource.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME goes first
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("evenflow", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def start(self, headers: Mapping[str, str], name: str = "llm_request") -> RequestSpan:
        """Open a span now. headers: the HTTP request's, names in lower case; a valid `traceparent` is the parent."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(headers, Context())
        return RequestSpan(self._tracer.start_span(name, parent, SpanKind.SERVER))

    def shutdown(self, timeout_s: float = 5.0) -> bool:
        """Send what is queued; blocks up to `timeout_s`. False, and a warning, if that was not enough."""
        thread = threading.Thread(target=self._provider.shutdown, name="evenflow-traces", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            logger.warning("the last traces were not delivered within %g s and are lost", timeout_s)
        return not thread.is_alive()


def make_tracer(endpoint: str | None) -> Tracer | None:
    """A tracer that sends to an OTLP/HTTP collector such as http://localhost:4318, or None if none is asked for.

    /v1/traces is added to an endpoint without a path. Nothing is sent yet. ValueError: not a URL, or not installed.
    """
    if endpoint is None:
        return None
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"otlp_endpoint={endpoint!r} must be a URL such as http://localhost:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise ValueError(f'otlp_endpoint needs OpenTelemetry ({error}): pip install "evenflow[otel]"') from error
    traces = url if url.path.strip("/") else url._replace(path="/v1/traces")
    return Tracer(OTLPSpanExporter(endpoint=traces.geturl()))
