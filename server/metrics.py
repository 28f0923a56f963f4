"""What `/metrics` reports, in Prometheus' format.

Labels come from closed sets (models, routes, methods, statuses, reasons), never from clients: the
number of series is fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .metric_families import REQUEST_BUCKETS, Families, Histogram
from .model_metrics import ModelMetrics

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "POST", "OPTIONS", "HEAD", "PUT", "PATCH", "DELETE"})


class ServerMetrics(Collector):
    """The page: what is counted by model (`model_metrics.py`), and HTTP replies."""

    def __init__(self, models: Sequence[ModelMetrics], *, prefix: str = "llmserve") -> None:
        """Names begin as `prefix` says."""
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._families = Families(prefix, {})
        self._durations = Histogram(REQUEST_BUCKETS)
        self._replies: Counter[tuple[str, ...]] = Counter()

    def count_reply(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Note an HTTP reply; `route` is a template of ours, never a path as sent."""
        self._replies[route, method if method in METHODS else "other", str(status)] += 1
        self._durations.observe(duration_s)

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Every metric family, at present; one that all models have is one family."""
        families: dict[str, Metric] = {}
        for model in self._models:
            for family in model.families():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        yield from families.values()
        yield self._families.counters(
            "http_requests", "HTTP replies.", ["handler", "method", "status"], self._replies
        )
        yield self._families.histogram(
            "http_request_duration_seconds", "Request to the end of its reply.", self._durations
        )
