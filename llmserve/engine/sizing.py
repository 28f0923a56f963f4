"""How many KV blocks a memory budget buys, and how many one sequence needs."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ConfigError
from ..runners.protocol import CacheGroup, RunnerInfo
from .config import EngineConfig, PolicyName, SpeculationConfig, StepCost

__all__ = ["blocks_of_one", "check_pools", "plan_cache"]


def blocks_of_one(
    group: CacheGroup, *, max_seq_len: int, block_size: int, max_batched_tokens: int
) -> int:
    """Blocks of `group` that one sequence holds at most: all of it, or a window and one chunk."""
    longest = -(-max_seq_len // block_size)
    if group.window is None:
        return longest
    span = group.window - 1 + max(max_batched_tokens, block_size)
    return min(longest, -(-span // block_size) + 1)


def check_pools(config: EngineConfig, groups: tuple[CacheGroup, ...]) -> None:
    """Raise `ConfigError` unless every pool holds one sequence of full length."""
    if len(config.num_blocks) != len(groups):
        raise ConfigError(
            f"num_blocks has {len(config.num_blocks)} numbers; this model has {len(groups)} "
            "cache groups"
        )
    for count, group in zip(config.num_blocks, groups, strict=True):
        needed = blocks_of_one(
            group,
            max_seq_len=config.max_seq_len,
            block_size=config.block_size,
            max_batched_tokens=config.most_tokens,
        )
        if count < needed:
            raise ConfigError(
                f"{count} KV blocks of {config.block_size} tokens cannot hold one sequence of "
                f"{config.max_seq_len} tokens, which needs {needed}: give the cache more memory or "
                "lower max_seq_len"
            )


def plan_cache(
    info: RunnerInfo,
    *,
    cache_bytes: int,
    max_seq_len: int | None = None,
    block_size: int = 16,
    max_batched_tokens: int = 512,
    max_num_seqs: int = 64,
    has_prefix_cache: bool = True,
    policy: PolicyName = "fcfs",
    tenant_weights: Mapping[str, float] | None = None,
    speculation: SpeculationConfig | None = None,
    step_cost: StepCost | None = None,
    draft_info: RunnerInfo | None = None,
) -> EngineConfig:
    """The engine's sizes for a model and a budget of KV cache memory.

    The pools take what `cache_bytes` buys, in the proportion in which sequences need them, but no
    more than `max_num_seqs` sequences of full length can use. The context is the model's, or
    `max_seq_len` where that is asked, and never more than the pools hold. A draft model's cache
    (`draft_info`) has as many blocks as the target's first pool and is paid from the same budget.
    There is no prefix cache where the runner shares no blocks.

    Raises `ConfigError` when the budget does not hold one block, or not the context asked for, or
    when a draft model's runner shares no blocks.
    """
    if draft_info is not None and not draft_info.shares_blocks:
        raise ConfigError(f"a draft model cannot run on the runner {draft_info.runner}")
    if max_seq_len is not None and max_seq_len > info.max_seq_len:
        raise ConfigError(
            f"max_seq_len {max_seq_len} is above this model's context of {info.max_seq_len} tokens"
        )
    block_bytes = [group.bytes_per_token * block_size for group in info.cache_groups]
    if draft_info is not None:
        block_bytes[0] += draft_info.cache_bytes_per_token * block_size
    affordable = cache_bytes // sum(block_bytes)
    if affordable < 1:
        raise ConfigError(
            f"a KV cache of {cache_bytes} bytes does not hold one block of {block_size} tokens, "
            f"which takes {sum(block_bytes)} bytes"
        )
    context = max_seq_len or min(info.max_seq_len, affordable * block_size)
    most = [
        max_num_seqs
        * blocks_of_one(
            group,
            max_seq_len=context,
            block_size=block_size,
            max_batched_tokens=max_batched_tokens,
        )
        for group in info.cache_groups
    ]
    config = EngineConfig(
        num_blocks=_share_out(cache_bytes, most, block_bytes),
        block_size=block_size,
        max_seq_len=context,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=max_num_seqs,
        has_prefix_cache=has_prefix_cache and info.shares_blocks,
        policy=policy,
        tenant_weights=tenant_weights or {},
        speculation=speculation,
        step_cost=step_cost,
    )
    check_pools(config, info.cache_groups)
    return config


def _share_out(cache_bytes: int, most: list[int], block_bytes: list[int]) -> tuple[int, ...]:
    """Blocks of each pool: `most`, or all of them cut by one factor to fit the budget."""
    wanted = sum(count * size for count, size in zip(most, block_bytes, strict=True))
    if wanted <= cache_bytes:
        return tuple(most)
    return tuple(max(1, count * cache_bytes // wanted) for count in most)
