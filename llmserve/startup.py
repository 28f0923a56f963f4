"""From a loaded runner and a person's wishes to an engine: sizes, calibration, drafts, log."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from .engine.calibration import MOST_TOKENS, calibrate, measure_cost
from .engine.config import EngineConfig, PolicyName, SpeculationConfig
from .engine.engine import Engine
from .engine.sizing import plan_cache
from .engine.speculator import make_drafter
from .engine.watcher import Watcher
from .runners.protocol import Runner

__all__ = ["EngineOptions", "plan_engine", "start_engine"]

_log = logging.getLogger("llmserve.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What may be asked of an engine, before a model has said what it can."""

    cache_bytes: int = 256 << 20
    """Memory for the KV cache."""
    max_seq_len: int | None = None
    """Tokens of context; None: the model's."""
    block_size: int = 16
    """Tokens in one KV block."""
    max_num_seqs: int = 64
    """Most sequences running at once."""
    max_batched_tokens: int | None = None
    """Most tokens in one step; None: as many as `max_step_s` allows, found by trying."""
    max_prefill_tokens: int = 0
    far_token_weight: float = 1.0
    """Where that number is given: both as in `EngineConfig`."""
    max_step_s: float | None = None
    """Longest time of a full step, where its size is found by trying; None: by the model's own."""
    has_prefix_cache: bool = True
    """Whether blocks are shared between requests with equal beginnings."""
    policy: PolicyName = "fcfs"
    """Who is served first."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of tenants under the policy `fair`."""
    most_rounds_s: float = 0.002
    """Time that a step of several rounds of decoding may take: about what nobody notices who reads
    along, or waits to be let in."""
    speculation: SpeculationConfig | None = None
    """How tokens are guessed ahead; None: not at all."""


def start_engine(
    runner: Runner,
    options: EngineOptions,
    *,
    config: EngineConfig | None = None,
    draft_runner: Runner | None = None,
    watcher: Watcher | None = None,
) -> Engine:
    """An engine over a loaded runner, with a draft model's beside it where one is asked for.

    `config` holds the sizes that an engine of the same model and options was given before; without
    it they are planned, and found by trying where that was asked.

    Raises:
        ConfigError: the cache does not hold the context, or the draft model does not fit.
    """
    config = config or plan_engine(runner, options, draft_runner=draft_runner)
    drafter = make_drafter(runner.info, config, draft_runner)
    return Engine(runner, config, drafter=drafter, watcher=watcher)


def plan_engine(
    runner: Runner, options: EngineOptions, *, draft_runner: Runner | None = None
) -> EngineConfig:
    """The sizes; runs the runner for a moment where something has to be measured."""
    most = options.max_batched_tokens or MOST_TOKENS
    config = _plan(runner, options, max(most, options.max_prefill_tokens), draft_runner)
    config = dataclasses.replace(
        config,
        max_batched_tokens=most,
        max_prefill_tokens=options.max_prefill_tokens,
        far_token_weight=options.far_token_weight,
        most_rounds_s=options.most_rounds_s,
    )
    if options.max_batched_tokens is None:
        found = calibrate(runner, config, max_step_s=options.max_step_s, clock=time.perf_counter)
        if found.full_step_s > found.max_step_s:
            _log.warning(
                "a step of a block's tokens, the least there is, takes %.0f ms at the end of the "
                "longest prompt; it is to stay under %.0f ms",
                1e3 * found.full_step_s, 1e3 * found.max_step_s,
            )  # fmt: skip
        config = dataclasses.replace(
            _plan(runner, options, found.max_prefill_tokens, draft_runner),
            max_batched_tokens=found.max_batched_tokens,
            max_prefill_tokens=found.max_prefill_tokens,
            far_token_weight=found.far_token_weight,
            most_rounds_s=options.most_rounds_s,
            step_cost=found.step_cost,
            full_step_s=found.full_step_s,
        )
    elif options.speculation is not None:
        cost = measure_cost(runner, config, clock=time.perf_counter)
        config = dataclasses.replace(config, step_cost=cost)
    if draft_runner is not None:
        cost = measure_cost(draft_runner, config, clock=time.perf_counter)
        config = dataclasses.replace(config, draft_cost=cost)
    return config


def _plan(
    runner: Runner, options: EngineOptions, max_batched_tokens: int, draft_runner: Runner | None
) -> EngineConfig:
    return plan_cache(
        runner.info,
        cache_bytes=options.cache_bytes,
        max_seq_len=options.max_seq_len,
        block_size=options.block_size,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        has_prefix_cache=options.has_prefix_cache,
        policy=options.policy,
        tenant_weights=options.tenant_weights,
        speculation=options.speculation,
        draft_info=draft_runner.info if draft_runner is not None else None,
    )
