"""Requests as OpenTelemetry spans: the one door to that library, open only where it is asked for.

A span for each HTTP request, under the caller's where it sent a `traceparent`; below it the queue,
the prompt and the answer of each prompt that the engine took. Spans hold counts and times, and no
prompt, answer or key. Names of attributes are OpenTelemetry's for generative AI.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmserve.errors import MissingDependencyError

from .traces import RequestTrace

__all__ = ["HttpSpan", "SpanExport", "open_export"]

SERVER_ERROR = 500
NANOSECONDS = 1e9
PHASES = ("queue", "prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSpan:
    """What is told of an HTTP request."""

    method: str
    route: str
    """A template of ours, never a path as sent."""
    status: int
    started: float
    """By `time.monotonic`."""
    ended: float
    request_id: str
    headers: Mapping[str, str]
    """For the caller's `traceparent`."""


class SpanExport:
    """Makes spans of requests that have ended, and hands them to an exporter."""

    def __init__(self, processor: Any) -> None:
        """`processor` is the library's: it decides when spans leave, and where to."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        self._provider = TracerProvider(resource=Resource.create({"service.name": "llmserve"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("llmserve")

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def export(self, http: HttpSpan, traces: Sequence[RequestTrace]) -> None:
        """The spans of one request. Never waits for the network."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(
            f"{http.method} {http.route}",
            context=TraceContextTextMapPropagator().extract(dict(http.headers)),
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(http.started + offset),
            attributes=_attributes(http, traces),
        )
        if http.status >= SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        for trace in traces:
            self._export_phases(trace, set_span_in_context(span), offset)
        span.end(_nanoseconds(http.ended + offset))

    def _export_phases(self, trace: RequestTrace, context: Any, offset: float) -> None:
        started = trace.arrival_time + offset
        for name in PHASES:
            duration_s = trace.phases()[f"{name}_s"]
            if duration_s is None:
                return
            span = self._tracer.start_span(name, context=context, start_time=_nanoseconds(started))
            started += duration_s
            span.end(_nanoseconds(started))


def open_export(endpoint: str) -> SpanExport:
    """Spans sent by OTLP over HTTP to `endpoint`, in the background.

    Raises `MissingDependencyError` where the library is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingDependencyError(
            "opentelemetry", extra="otel", feature="the export of traces"
        ) from error
    return SpanExport(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))


def _attributes(http: HttpSpan, traces: Sequence[RequestTrace]) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": http.method,
        "http.route": http.route,
        "http.response.status_code": http.status,
        "llmserve.request_id": http.request_id,
    }
    if traces:
        attributes |= {
            "gen_ai.usage.input_tokens": sum(trace.num_prompt_tokens for trace in traces),
            "gen_ai.usage.output_tokens": sum(trace.num_output_tokens for trace in traces),
            "llmserve.usage.cached_tokens": sum(trace.num_cached_tokens for trace in traces),
            "llmserve.num_preemptions": sum(trace.num_preemptions for trace in traces),
            "gen_ai.response.finish_reasons": [
                reason for trace in traces for reason in trace.finish_reasons.values()
            ],
        }
    return attributes


def _nanoseconds(seconds: float) -> int:
    return int(seconds * NANOSECONDS)
