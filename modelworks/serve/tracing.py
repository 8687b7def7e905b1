"""OpenTelemetry spans over OTLP/HTTP, when an endpoint is set: one a request, below it one a call of a replica.

`traceparent` and `tracestate` of W3C Trace Context are honoured. The libraries come with the extra `otel`; without an
endpoint nothing of this is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from modelworks.core.errors import InvalidInput, MissingExtra
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part


def check(endpoint: str, *, offline: bool) -> None:
    """Refuse, at the server's start, an endpoint that could not be used."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput("give otlp_endpoint as an http or https address", param="otlp_endpoint")
    if offline and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise InvalidInput(
            "with offline, otlp_endpoint must be on this machine; unset one of them", param="otlp_endpoint"
        )
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        raise MissingExtra("traces need the OpenTelemetry SDK: pip install 'modelworks[otel]', or unset otlp_endpoint")


class Tracing:
    """`endpoint`: the collector's base address, as OTEL_EXPORTER_OTLP_ENDPOINT has it; /v1/traces is appended."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "modelworks"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("modelworks")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def begin(self, method: str, headers: Mapping[str, str] | None) -> RequestSpan:
        """A span for a request, begun now, child of what `headers` (traceparent, tracestate) name."""
        context = self._propagator.extract(dict(headers)) if headers else None
        span = self._tracer.start_span(
            method, context=context, kind=self._trace.SpanKind.SERVER, attributes={"http.request.method": method}
        )
        within = self._trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False)
        return RequestSpan(span, within, self._trace.StatusCode.ERROR)

    def call(self, route: Route) -> CallSpan:
        """A span for a call of a replica, child of the request's that is current, begun now."""
        span = self._tracer.start_span(
            "call replica",
            kind=self._trace.SpanKind.CLIENT,
            attributes={"modelworks.deployment": route.name, "modelworks.model_version": route.model_version},
        )
        return CallSpan(span, self._trace.StatusCode.ERROR)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


class RequestSpan:
    """The span of one request, in either lane: `with span:` around what submits its calls, then `end`, once."""

    __slots__ = ("_failed", "_span", "_within")

    def __init__(self, span: Any, within: contextlib.AbstractContextManager[Any], failed: Any) -> None:
        self._span = span
        self._within = within
        self._failed = failed

    def __enter__(self) -> None:
        self._within.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._within.__exit__(*error)

    def end(self, operation: str, status: int, request_id: str, deployment: str = "") -> None:
        span = self._span
        if operation:
            span.update_name(operation)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("modelworks.request_id", request_id)
        if deployment:
            span.set_attribute("modelworks.deployment", deployment)
        if status >= 500:
            span.set_status(self._failed)
        span.end()


class CallSpan:
    """The span of one call of a replica."""

    __slots__ = ("_failed", "_span")

    def __init__(self, span: Any, failed: Any) -> None:
        self._span = span
        self._failed = failed

    def answered(self, part: Part) -> None:
        span = self._span
        span.set_attribute("modelworks.model_version", part.model_version)
        span.set_attribute("modelworks.queue_us", part.queue_us)
        span.set_attribute("modelworks.model_us", part.run_us)
        span.set_attribute("modelworks.batch", part.batch)
        span.end()

    def ended(self, status: int) -> None:
        self._span.set_attribute("modelworks.status", status)
        if status >= 500:
            self._span.set_status(self._failed)
        self._span.end()
