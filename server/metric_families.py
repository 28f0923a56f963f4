"""Metric families under a prefix: our own names, or those that boards for vLLM look for.

The histograms are our own: one observation per token has to cost a bisection and two additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

__all__ = [
    "FIRST_TOKEN_BUCKETS",
    "PREFIXES",
    "REQUEST_BUCKETS",
    "TOKEN_BUCKETS",
    "TOKEN_GAP_BUCKETS",
    "Families",
    "Histogram",
]

PREFIXES = {"llmserve": "llmserve_", "vllm": "vllm:"}
"""Values of the option `--metrics-prefix`, with what each puts before a name."""

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_GAP_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
    50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip


class Histogram:
    """Counts of values by upper bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value. O(log bounds)."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Counts up to each bound, as Prometheus wants them, and the sum of all values."""
        buckets, total = [], 0
        for bound, count in zip([*self._bounds, float("inf")], self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return buckets, self._sum


class Families:
    """Makes families with one prefix, and labels that all of them have."""

    def __init__(self, prefix: str, labels: Mapping[str, str]) -> None:
        """`prefix` is a key of `PREFIXES`."""
        self._prefix = PREFIXES[prefix]
        self.step_tokens = "iteration_tokens_total" if prefix == "vllm" else "iteration_tokens"
        """Name of the histogram of a step's tokens: vLLM's ends as only a counter's should."""
        self._names = list(labels)
        self._values = list(labels.values())

    def gauge(self, name: str, documentation: str, value: float) -> Metric:
        """One number that goes up and down."""
        family = GaugeMetricFamily(self._prefix + name, documentation, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def info(self, name: str, documentation: str, facts: Mapping[str, str]) -> Metric:
        """Facts as labels of a 1."""
        names = [*self._names, *facts]
        family = GaugeMetricFamily(self._prefix + name, documentation, labels=names)
        family.add_metric([*self._values, *facts.values()], 1)
        return family

    def counter(self, name: str, documentation: str, value: float) -> Metric:
        """One number that only grows."""
        return self.counters(name, documentation, (), {(): value})

    def counters(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        values: Mapping[tuple[str, ...], float],
    ) -> Metric:
        """Several, by labels of their own."""
        names = [*self._names, *labels]
        family = CounterMetricFamily(self._prefix + name, documentation, labels=names)
        for own, value in values.items():
            family.add_metric([*self._values, *own], value)
        return family

    def histogram(self, name: str, documentation: str, histogram: Histogram) -> Metric:
        """Counts of values by size."""
        family = HistogramMetricFamily(self._prefix + name, documentation, labels=self._names)
        buckets, total = histogram.cumulative()
        family.add_metric(self._values, buckets, total)
        return family
