"""Sizes of one engine, and how many KV blocks a memory budget buys."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..runners.protocol import RunnerInfo

__all__ = ["EngineConfig", "plan_cache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and sizes of one engine."""

    num_blocks: int
    """KV blocks in the pool."""
    block_size: int = 16
    """Tokens in one KV block."""
    max_seq_len: int
    """Most tokens of one sequence, prompt and answer together; the pool holds at least one such."""
    max_batched_tokens: int = 512
    """Most tokens in one step, decodes and prefill chunks together."""
    max_num_seqs: int = 64
    """Most sequences running at once; at most `max_batched_tokens`, so that each can decode."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
        if self.max_seq_len > self.num_blocks * self.block_size:
            raise ConfigError(
                f"{self.num_blocks} KV blocks of {self.block_size} tokens cannot hold one sequence "
                f"of {self.max_seq_len} tokens: give the cache more memory or lower max_seq_len"
            )
        if self.max_num_seqs > self.max_batched_tokens:
            raise ConfigError(
                f"max_num_seqs ({self.max_num_seqs}) is above max_batched_tokens "
                f"({self.max_batched_tokens}): a step could not advance every running sequence"
            )


def plan_cache(
    info: RunnerInfo,
    *,
    cache_bytes: int,
    max_seq_len: int | None = None,
    block_size: int = 16,
    max_batched_tokens: int = 512,
    max_num_seqs: int = 64,
) -> EngineConfig:
    """The engine's sizes for a model and a budget of KV cache memory.

    The pool takes what `cache_bytes` buys, but no more than `max_num_seqs` sequences of full
    length can use. The context is the model's, or `max_seq_len` where that is asked, and never
    more than the pool holds.

    Raises `ConfigError` when the budget does not hold one block, or not the context asked for.
    """
    if max_seq_len is not None and max_seq_len > info.max_seq_len:
        raise ConfigError(
            f"max_seq_len {max_seq_len} is above this model's context of {info.max_seq_len} tokens"
        )
    block_bytes = info.cache_bytes_per_token * block_size
    affordable = cache_bytes // block_bytes
    if affordable < 1:
        raise ConfigError(
            f"a KV cache of {cache_bytes} bytes does not hold one block of {block_size} tokens, "
            f"which takes {block_bytes} bytes"
        )
    context = max_seq_len or min(info.max_seq_len, affordable * block_size)
    most_useful = max_num_seqs * -(-context // block_size)
    return EngineConfig(
        num_blocks=min(affordable, most_useful),
        block_size=block_size,
        max_seq_len=context,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=max_num_seqs,
    )
