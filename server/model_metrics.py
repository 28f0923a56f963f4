"""What is counted of one model: by the routes that it answers, and by its engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import Metric

from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import EngineStats
from llmserve.engine.request import FinishReason

from .engine_handle import EngineHandle
from .engine_stats import HandoverTotals
from .metric_families import (
    FIRST_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    TOKEN_BUCKETS,
    TOKEN_GAP_BUCKETS,
    Families,
    Histogram,
)

__all__ = ["ModelMetrics"]


class ModelMetrics:
    """Counters and histograms of one model and of those that take its place."""

    def __init__(
        self,
        read_engine: Callable[[], EngineHandle],
        *,
        prefix: str = "llmserve",
        model_name: str,
    ) -> None:
        """`read_engine` gives the one that serves now.

        Names begin as `prefix` says; vLLM's have its label `engine` too.
        """
        self._read_engine = read_engine
        labels = {"model_name": model_name}
        self._families = Families(prefix, {**labels, "engine": "0"} if prefix == "vllm" else labels)
        self.first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self.token_gap = Histogram(TOKEN_GAP_BUCKETS)
        self.request = Histogram(REQUEST_BUCKETS)
        self.queue = Histogram(REQUEST_BUCKETS)
        self.prefill = Histogram(REQUEST_BUCKETS)
        self.decode = Histogram(REQUEST_BUCKETS)
        self.inference = Histogram(REQUEST_BUCKETS)
        self.prompt_tokens = Histogram(TOKEN_BUCKETS)
        self.answer_tokens = Histogram(TOKEN_BUCKETS)
        self.step_tokens = Histogram(TOKEN_BUCKETS)
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._ended: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})

    def observe_phases(self, phases: Mapping[str, float | None]) -> None:
        """Note how long a request read its prompt and wrote its answer, as far as it came."""
        prefill_s, decode_s = phases["prefill_s"], phases["decode_s"]
        if prefill_s is not None and decode_s is not None:
            self.prefill.observe(prefill_s)
            self.decode.observe(decode_s)
            self.inference.observe(prefill_s + decode_s)

    def count_end(self, reason: FinishReason) -> None:
        """Note that a choice ended."""
        self._ended[reason.value] += 1

    def families(self) -> Iterable[Metric]:
        """Every metric family, at present."""
        engine = self._read_engine()
        yield from self._engine_families(engine)
        yield self._families.counter(
            "prompt_tokens", "Prompt tokens taken in.", self.num_prompt_tokens
        )
        yield self._families.counter(
            "generation_tokens", "Tokens generated.", self.num_generated_tokens
        )
        yield self._families.counters(
            "request_success",
            "Choices ended, by reason.",
            ["finished_reason"],
            {(reason,): count for reason, count in self._ended.items()},
        )
        yield from self._histogram_families()
        yield self._families.info(
            "cache_config_info", "Sizes of the KV cache.", _cache_facts(engine.config)
        )

    def _engine_families(self, engine: EngineHandle) -> Iterable[Metric]:
        config = engine.config
        stats = engine.stats or _nothing_yet(sum(config.num_blocks))
        running, waiting = stats.num_running, stats.num_waiting
        yield self._families.gauge("num_requests_running", "Sequences in the batch.", running)
        yield self._families.gauge(
            "num_requests_waiting", "Sequences waiting for the batch.", waiting
        )
        yield self._families.gauge(
            "kv_cache_usage_perc",
            "Share of KV blocks in use, in the fullest pool, 0 to 1.",
            stats.cache_usage,
        )
        yield self._families.gauge("kv_cache_blocks", "KV blocks in all pools.", stats.num_blocks)
        handovers = engine.handovers
        restarts = engine.num_restarts + (handovers.num_restarts if handovers else 0)
        yield self._families.counter(
            "engine_restarts", "Engine processes that were replaced.", restarts
        )
        yield self._families.counter("engine_steps", "Steps computed.", stats.num_steps)
        yield self._families.counter(
            "num_preemptions", "Sequences put back to waiting.", stats.num_preemptions
        )
        yield self._families.counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.num_prefix_queries,
        )
        yield self._families.counter(
            "prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            stats.num_prefix_hits,
        )
        if handovers is not None:
            yield from self._handover_families(handovers)
        if config.speculation is not None:
            yield from self._speculation_families(stats, config.speculation.num_draft_tokens)

    def _handover_families(self, totals: HandoverTotals) -> Iterable[Metric]:
        yield self._families.counter(
            "handover_requests",
            "Requests whose prompts were computed by an engine that only reads.",
            totals.num_requests,
        )
        yield self._families.counter(
            "handover_blocks", "KV blocks taken over from such an engine.", totals.num_blocks
        )
        yield self._families.counter(
            "handover_seconds", "Time that engines spent on copying them.", totals.seconds
        )

    def _speculation_families(self, stats: EngineStats, most: int) -> Iterable[Metric]:
        prefix = "spec_decode_num_"
        yield self._families.counter(
            prefix + "drafts", "Times that tokens were guessed.", stats.num_drafts
        )
        yield self._families.counter(
            prefix + "draft_tokens", "Tokens guessed.", stats.num_draft_tokens
        )
        yield self._families.counter(
            prefix + "accepted_tokens", "Guesses that were right.", stats.num_accepted_tokens
        )
        places = stats.accepted_per_position or [0] * most
        yield self._families.counters(
            prefix + "accepted_tokens_per_pos",
            "Guesses that were right, by their place from 0.",
            ["position"],
            {(str(place),): count for place, count in enumerate(places)},
        )

    def _histogram_families(self) -> Iterable[Metric]:
        for name, documentation, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", self.first_token),
            ("inter_token_latency_seconds", "Between two tokens of a choice.", self.token_gap),
            ("e2e_request_latency_seconds", "Arrival to the end of a request.", self.request),
            ("request_queue_time_seconds", "Arrival to first being scheduled.", self.queue),
            ("request_prefill_time_seconds", "First scheduled to first token.", self.prefill),
            ("request_decode_time_seconds", "First token to last.", self.decode),
            ("request_inference_time_seconds", "First scheduled to last token.", self.inference),
            ("request_prompt_tokens", "Tokens of a request's prompts.", self.prompt_tokens),
            ("request_generation_tokens", "Tokens of its answers.", self.answer_tokens),
            (self._families.step_tokens, "Tokens computed in a step.", self.step_tokens),
        ):
            yield self._families.histogram(name, documentation, histogram)


def _cache_facts(config: EngineConfig) -> dict[str, str]:
    return {
        "block_size": str(config.block_size),
        "num_blocks": str(sum(config.num_blocks)),
        "enable_prefix_caching": str(config.has_prefix_cache),
    }


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
