"""Requests as OpenTelemetry spans, by the library's own reading of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import MissingDependencyError
from llmserve.server.trace_export import SpanExport, open_export
from support.servers import LocalServer, local_server

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def spans_of(server: LocalServer, **headers: str) -> list[Any]:
    """The spans of one completion of two prompts."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter = memory.InMemorySpanExporter()
    server.state.spans = SpanExport(SimpleSpanProcessor(exporter))
    body = {"prompt": [[5] * 20, [6]], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    assert server.post("/v1/completions", body, **headers).status == 200
    server.state.spans.close()
    server.state.spans = None
    return list(exporter.get_finished_spans())


def test_a_request_is_a_span_with_its_phases_below(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        *phases, whole = spans_of(server)
    assert whole.name == "POST /v1/completions"
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["gen_ai.usage.input_tokens"] == 21
    assert whole.attributes["gen_ai.usage.output_tokens"] == 8
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert whole.parent is None
    assert [span.name for span in phases] == ["queue", "prefill", "decode"] * 2
    for span in phases:
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time <= span.start_time <= span.end_time


def test_it_goes_under_the_callers_span(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        *_, whole = spans_of(server, traceparent=PARENT)
    assert f"{whole.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == PARENT.split("-")[2]


def test_nothing_else_exports_what_clients_wrote(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The web framework has telemetry of its own, with the bodies of refused requests."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter, provider = memory.InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with local_server(model_folder) as server:
        assert server.post("/v1/completions", {"prompt": "secret", "max_tokens": "x"}).status == 400
    assert not exporter.get_finished_spans()


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"llmserve\[otel\]"):
        open_export("http://127.0.0.1:1/v1/traces")
