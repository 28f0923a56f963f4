"""From the records of a run to its figures: one place for every definition.

Names and definitions are those of `vllm bench serve`, so that its scripts read ours. Two choices
of our own: a statistic of nothing is None, not 0; and latency counts from the intended send time
(`RequestRecord.origin_s`), with `ttft_from_send`, `e2el_from_send` and `client_queue_time` beside
it, which show how much of it the client itself spent waiting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from llmserve.errors import ConfigError

from .record import RequestRecord

__all__ = [
    "LATENCIES",
    "SLO_NAMES",
    "LoadMetrics",
    "Summary",
    "compute_metrics",
    "meets_slos",
    "parse_slos",
    "samples_by_request",
    "statistics_of",
    "summarize",
]

LATENCIES = (
    "ttft",
    "tpot",
    "itl",
    "e2el",
    "ttft_from_send",
    "e2el_from_send",
    "client_queue_time",
)
SLO_NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution in milliseconds."""

    mean: float
    median: float
    std: float
    """Of the population (no Bessel correction)."""
    percentiles: dict[float, float]
    """Percent → value, linear between samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMetrics:
    """Every figure of one run. Rates are per second of `duration_s`; only successes count."""

    duration_s: float
    """From the first intended send to the last end."""
    completed: int
    failed: int
    errors_by_kind: dict[str, int]
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    """Requests that met every objective, per second; None: no objective given."""
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    """Most output tokens in one whole second of the run, counted from its first send."""
    max_concurrent_requests: int
    """Most successful requests between their send and their last token at one time."""
    latencies: dict[str, Summary | None]
    """By name of `LATENCIES`; None: no sample."""


def compute_metrics(
    records: Sequence[RequestRecord],
    *,
    duration_s: float,
    percentiles: Sequence[float],
    slos_ms: Mapping[str, float] | None = None,
) -> LoadMetrics:
    """All figures of `records`, finished requests of a run that took `duration_s` (> 0).

    `slos_ms` names upper bounds in milliseconds by `SLO_NAMES`; a request is good when it meets
    every one. TPOT counts as 0 there for an answer of fewer than two tokens.
    """
    good = [record for record in records if record.is_success]
    kinds = Counter(record.error_kind for record in records if record.error_kind)
    output_tokens = sum(record.output_tokens for record in good)
    input_tokens = sum(record.prompt_tokens or 0 for record in good)
    num_in_time = sum(_meets(record, slos_ms) for record in good) if slos_ms else None
    return LoadMetrics(
        duration_s=duration_s,
        completed=len(good),
        failed=len(records) - len(good),
        errors_by_kind=dict(sorted(kinds.items())),
        total_input_tokens=input_tokens,
        total_output_tokens=output_tokens,
        request_throughput=len(good) / duration_s,
        request_goodput=None if num_in_time is None else num_in_time / duration_s,
        output_throughput=output_tokens / duration_s,
        total_token_throughput=(input_tokens + output_tokens) / duration_s,
        max_output_tokens_per_s=_peak_tokens(good),
        max_concurrent_requests=_peak_concurrency(good),
        latencies={
            name: summarize(list(chain.from_iterable(samples)), percentiles)
            for name, samples in samples_by_request(good).items()
        },
    )


def samples_by_request(good: Sequence[RequestRecord]) -> dict[str, list[list[float]]]:
    """Seconds by name of `LATENCIES`, as each request gave them: one value, none, or all gaps."""
    return {
        "ttft": [[record.ttft_s] for record in good],
        "tpot": [[] if (tpot := record.tpot_s) is None else [tpot] for record in good],
        "itl": [record.itls_s for record in good],
        "e2el": [[record.e2e_s] for record in good],
        "ttft_from_send": [[record.ttft_s - record.client_queue_s] for record in good],
        "e2el_from_send": [[record.e2e_s - record.client_queue_s] for record in good],
        "client_queue_time": [[record.client_queue_s] for record in good],
    }


def parse_slos(pairs: Sequence[str], *, option: str = "--goodput") -> dict[str, float]:
    """Upper bounds in milliseconds by `SLO_NAMES`, from texts like `ttft:200` given as `option`.

    Raises:
        ConfigError: an unknown name, or no number of at least 0.
    """
    slos = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            slos[name] = float(value)
        except ValueError:
            slos[name] = math.nan
        if name not in SLO_NAMES or not slos[name] >= 0:
            raise ConfigError(
                f"{option} takes NAME:MILLISECONDS with {', '.join(SLO_NAMES)}, got {pair!r}"
            )
    return slos


def meets_slos(
    slos_ms: Mapping[str, float], *, ttft_s: float, tpot_s: float | None, e2e_s: float
) -> bool:
    """Whether a request met every bound; without a TPOT (below two tokens) it counts as 0."""
    measured = {"ttft": ttft_s, "tpot": tpot_s or 0.0, "e2el": e2e_s}
    return all(measured[name] * 1000.0 <= bound for name, bound in slos_ms.items())


def summarize(values_s: Sequence[float], percentiles: Sequence[float]) -> Summary | None:
    """The distribution of `values_s` (seconds) in milliseconds; None for no values."""
    if not values_s:
        return None
    values_ms = np.asarray(values_s, dtype=np.float64) * 1000.0
    return Summary(
        mean=float(values_ms.mean()),
        median=float(np.median(values_ms)),
        std=float(values_ms.std()),
        percentiles={q: float(np.percentile(values_ms, q)) for q in percentiles},
    )


def statistics_of(
    summary: Summary | None, percentiles: Sequence[float]
) -> Iterator[tuple[str, float | None]]:
    """Name and value of each statistic, `mean` to `p99`; values are None without a summary."""
    for name in ("mean", "median", "std"):
        yield name, None if summary is None else getattr(summary, name)
    for q in percentiles:
        yield f"p{q:g}", None if summary is None else summary.percentiles[q]


def _meets(record: RequestRecord, slos_ms: Mapping[str, float]) -> bool:
    return meets_slos(slos_ms, ttft_s=record.ttft_s, tpot_s=record.tpot_s, e2e_s=record.e2e_s)


def _peak_tokens(good: Sequence[RequestRecord]) -> float:
    """Fullest one-second bin; tokens come with their chunk."""
    if not good:
        return 0.0
    start_s = min(record.sent_s for record in good)
    chunks = np.array([time - start_s for record in good for time in record.chunk_times_s])
    tokens = [count for record in good for count in record.chunk_tokens]
    return float(np.bincount(chunks.astype(np.int64), weights=tokens).max())


def _peak_concurrency(good: Sequence[RequestRecord]) -> int:
    """Deepest overlap of the intervals [sent, last token); an end goes before a start."""
    edges = [(record.sent_s, 1) for record in good]
    edges += [(record.chunk_times_s[-1], -1) for record in good]
    depth = peak = 0
    for _, change in sorted(edges):
        depth += change
        peak = max(peak, depth)
    return peak
