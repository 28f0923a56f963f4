"""What `/metrics` reports, in Prometheus' format.

Labels come from closed sets (routes, methods, statuses, reasons), never from clients: the number
of series is fixed. The histograms are our own: one observation per token has to cost a bisection
and two additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import EngineStats
from llmserve.engine.request import FinishReason

__all__ = ["CONTENT_TYPE", "Histogram", "ServerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "llmserve_"

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

METHODS = frozenset({"GET", "POST", "OPTIONS", "HEAD", "PUT", "PATCH", "DELETE"})


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

    def family(self, name: str, documentation: str) -> Metric:
        """As Prometheus wants it: cumulative counts."""
        buckets, total = [], 0
        for bound, count in zip([*self._bounds, float("inf")], self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class ServerMetrics(Collector):
    """Counters and histograms of one server, fed by the routes and the engine."""

    def __init__(self, config: EngineConfig, read_stats: Callable[[], EngineStats | None]) -> None:
        self._config = config
        self._read_stats = read_stats
        self._nothing = _nothing_yet(sum(config.num_blocks))
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self.token_gap = Histogram(TOKEN_GAP_BUCKETS)
        self.request = Histogram(REQUEST_BUCKETS)
        self.queue = Histogram(REQUEST_BUCKETS)
        self.http = Histogram(REQUEST_BUCKETS)
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._ended: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})
        self._http: Counter[tuple[str, str, int]] = Counter()

    def count_end(self, reason: FinishReason) -> None:
        """Note that a choice ended."""
        self._ended[reason.value] += 1

    def count_reply(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Note an HTTP reply; `route` is a template of ours, never a path as sent."""
        self._http[route, method if method in METHODS else "other", status] += 1
        self.http.observe(duration_s)

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Every metric family, at present."""
        yield from self._engine_families()
        yield _counter("prompt_tokens", "Prompt tokens taken in.", self.num_prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", self.num_generated_tokens)
        ended = CounterMetricFamily(
            PREFIX + "request_success", "Choices ended, by reason.", labels=["finished_reason"]
        )
        for reason, count in self._ended.items():
            ended.add_metric([reason], count)
        yield ended
        yield from self._histogram_families()
        replies = CounterMetricFamily(
            PREFIX + "http_requests", "HTTP replies.", labels=["handler", "method", "status"]
        )
        for (route, method, status), count in self._http.items():
            replies.add_metric([route, method, str(status)], count)
        yield replies

    def _engine_families(self) -> Iterable[Metric]:
        stats = self._read_stats() or self._nothing
        running, waiting = stats.num_running, stats.num_waiting
        yield _gauge("num_requests_running", "Sequences in the batch.", running)
        yield _gauge("num_requests_waiting", "Sequences waiting for the batch.", waiting)
        yield _gauge(
            "kv_cache_usage_perc",
            "Share of KV blocks in use, in the fullest pool, 0 to 1.",
            stats.cache_usage,
        )
        yield _gauge("kv_cache_blocks", "KV blocks in all pools.", stats.num_blocks)
        yield _counter("engine_steps", "Steps computed.", stats.num_steps)
        yield _counter("num_preemptions", "Sequences put back to waiting.", stats.num_preemptions)
        yield _counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.num_prefix_queries,
        )
        yield _counter(
            "prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            stats.num_prefix_hits,
        )
        if self._config.speculation is not None:
            yield from self._speculation_families(stats, self._config.speculation.num_draft_tokens)

    def _speculation_families(self, stats: EngineStats, most: int) -> Iterable[Metric]:
        prefix = "spec_decode_num_"
        yield _counter(prefix + "drafts", "Times that tokens were guessed.", stats.num_drafts)
        yield _counter(prefix + "draft_tokens", "Tokens guessed.", stats.num_draft_tokens)
        yield _counter(
            prefix + "accepted_tokens", "Guesses that were right.", stats.num_accepted_tokens
        )
        by_place = CounterMetricFamily(
            PREFIX + prefix + "accepted_tokens_per_pos",
            "Guesses that were right, by their place from 0.",
            labels=["position"],
        )
        for place, count in enumerate(stats.accepted_per_position or [0] * most):
            by_place.add_metric([str(place)], count)
        yield by_place

    def _histogram_families(self) -> Iterable[Metric]:
        for name, documentation, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", self.first_token),
            ("inter_token_latency_seconds", "Between two tokens of a choice.", self.token_gap),
            ("e2e_request_latency_seconds", "Arrival to the end of a request.", self.request),
            ("request_queue_time_seconds", "Arrival to first being scheduled.", self.queue),
            ("http_request_duration_seconds", "Request to the end of its reply.", self.http),
        ):
            yield histogram.family(PREFIX + name, documentation)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, documentation, value=value)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, documentation, value=value)


def _nothing_yet(num_blocks: int) -> EngineStats:
    """An engine before its first step."""
    return EngineStats(
        num_running=0,
        num_waiting=0,
        num_waiting_tokens=0,
        num_free_blocks=num_blocks,
        num_blocks=num_blocks,
        num_steps=0,
        num_prefill_tokens=0,
        num_decode_tokens=0,
        num_preemptions=0,
    )
