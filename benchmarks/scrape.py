"""The server's own figures along a load test: its queue, its cache, its prefix hits.

Reads `/metrics` in Prometheus' text format before the load, every second during it, and after it,
by the names of llmserve, vLLM or llama.cpp. A server without such a page can be tested all the
same: a note says what is missing.

Source: Prometheus exposition formats, text format 0.0.4.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from llmserve.errors import LLMServeError

__all__ = ["METRICS_PATH", "Scraper", "parse_metrics"]

METRICS_PATH = "/metrics"
PERIOD_S = 1.0
SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?\s+(\S+)(?:\s+\S+)?")

# Name in the result → the same in llmserve and vLLM after their prefix, and in llama.cpp.
GAUGES = {
    "num_requests_running": ("num_requests_running", "requests_processing"),
    "num_requests_waiting": ("num_requests_waiting", "requests_deferred"),
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "kv_cache_usage_ratio"),
}
COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries_total", ""),
    "prefix_cache_hits": ("prefix_cache_hits_total", ""),
    "num_preemptions": ("num_preemptions_total", ""),
    "prompt_tokens": ("prompt_tokens_total", "prompt_tokens_total"),
    "generation_tokens": ("generation_tokens_total", "tokens_predicted_total"),
    "spec_decode_num_draft_tokens": ("spec_decode_num_draft_tokens_total", ""),
    "spec_decode_num_accepted_tokens": ("spec_decode_num_accepted_tokens_total", ""),
}
PREFIXES = (("llmserve_", 0), ("vllm:", 0), ("llamacpp:", 1))
"""Of each server, and which of the names above it has."""
SHARES = frozenset({"kv_cache_usage_perc"})
"""Of several engines the fullest counts; other figures are added up."""


@dataclass(slots=True)
class Scraper:
    """Looks at one server's metrics; `note` says why there are none."""

    fetch: Callable[[], Awaitable[bytes]]
    """The page as it is now; raises `LLMServeError`."""
    clock: Callable[[], float] = time.perf_counter
    looks: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """When, and what by the names of the result."""
    note: str = ""

    async def look(self) -> None:
        """Look once; a failure is noted and raises nothing."""
        try:
            values = parse_metrics((await self.fetch()).decode("utf-8", "replace"))
        except LLMServeError as error:
            self.note = f"no metrics of the server: {error}"
            return
        if not values:
            self.note = "no metrics of the server: its page holds none of the names known here"
            return
        self.looks.append((self.clock(), values))

    async def run(self) -> None:
        """Look every second until cancelled, if the first look found anything."""
        while self.looks:
            await asyncio.sleep(PERIOD_S)
            await self.look()

    def report(self, start_s: float) -> dict[str, object] | None:
        """The result's `server_metrics`; None: there are none. Times count from `start_s`.

        Counters are what was added between the first look, before the load, and the last, after it.
        Gauges are of the looks between those; a load that was over before one has none.
        """
        if not self.looks:
            return None
        first, last = self.looks[0][1], self.looks[-1][1]
        report: dict[str, object] = {"num_looks": len(self.looks)}
        for name in GAUGES:
            if values := [look[name] for _, look in self.looks[1:-1] if name in look]:
                report[name] = {"mean": sum(values) / len(values), "max": max(values)}
        added = {
            name: max(0.0, last[name] - first[name])
            for name in COUNTERS
            if name in first and name in last
        }
        report |= added
        if queries := added.get("prefix_cache_queries"):
            report["prefix_cache_hit_rate"] = added.get("prefix_cache_hits", 0.0) / queries
        report["timeline"] = [
            [time_s - start_s, *(look.get(name) for name in GAUGES)] for time_s, look in self.looks
        ]
        return report


def parse_metrics(page: str) -> dict[str, float]:
    """What a page says of the figures known here, by the names of the result."""
    samples: dict[str, list[float]] = {}
    for line in page.splitlines():
        if line.startswith("#") or (match := SAMPLE.fullmatch(line.strip())) is None:
            continue
        try:
            samples.setdefault(match[1], []).append(float(match[2]))
        except ValueError:
            continue  # not a number: not a sample
    for prefix, column in PREFIXES:
        if found := _found(samples, prefix, column):
            return found
    return {}


def _found(samples: Mapping[str, list[float]], prefix: str, column: int) -> dict[str, float]:
    found = {}
    for name, names in (GAUGES | COUNTERS).items():
        if names[column] and (values := samples.get(prefix + names[column])):
            found[name] = max(values) if name in SHARES else sum(values)
    return found
