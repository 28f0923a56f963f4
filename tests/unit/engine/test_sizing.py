"""Sizes of an engine from a memory budget."""

from __future__ import annotations

import pytest

from llmserve.engine.config import EngineConfig
from llmserve.engine.sizing import blocks_of_one, check_pools, plan_cache
from llmserve.errors import ConfigError
from llmserve.runners.protocol import CacheGroup
from support.engines import make_info

FULL = CacheGroup(num_layers=1, window=None, bytes_per_token=8)
WINDOW = CacheGroup(num_layers=3, window=32, bytes_per_token=24)


def test_pool_takes_what_the_budget_buys() -> None:
    config = plan_cache(make_info(), cache_bytes=16 * 8 * 20)
    assert (config.num_blocks, config.max_seq_len) == ((20,), 256)


def test_pool_is_no_larger_than_all_sequences_can_use() -> None:
    config = plan_cache(make_info(), cache_bytes=1 << 30, max_num_seqs=3)
    assert config.num_blocks == (3 * 256 // 16,)


def test_context_shrinks_to_what_the_pool_holds() -> None:
    assert plan_cache(make_info(), cache_bytes=16 * 8 * 4).max_seq_len == 64


def test_context_that_was_asked_for_is_not_shrunk_in_silence() -> None:
    with pytest.raises(ConfigError, match="cannot hold one sequence of 128"):
        plan_cache(make_info(), cache_bytes=16 * 8 * 4, max_seq_len=128)


def test_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="context of 256"):
        plan_cache(make_info(), cache_bytes=1 << 20, max_seq_len=257)


def test_budget_without_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not hold one block"):
        plan_cache(make_info(), cache_bytes=100)


def test_window_needs_itself_and_a_chunk_and_never_more_than_the_context() -> None:
    sizes = {"block_size": 16, "max_batched_tokens": 64}
    # Positions p - 31 .. p + 63 of a chunk from p on: 95 tokens that may begin within a block.
    assert blocks_of_one(WINDOW, max_seq_len=4096, **sizes) == 7
    assert blocks_of_one(WINDOW, max_seq_len=64, **sizes) == 4
    assert blocks_of_one(FULL, max_seq_len=4096, **sizes) == 256


def test_groups_share_the_budget_as_sequences_need_them() -> None:
    info = make_info(cache_groups=(FULL, WINDOW), max_seq_len=4096)
    budget = 500_000
    config = plan_cache(info, cache_bytes=budget, max_batched_tokens=64, max_num_seqs=64)
    spent = config.num_blocks[0] * 8 * 16 + config.num_blocks[1] * 24 * 16
    assert budget - 2 * 24 * 16 < spent <= budget
    full, window = config.num_blocks
    assert full / window == pytest.approx(256 / 7, rel=0.02)


def test_draft_model_is_paid_from_the_same_budget() -> None:
    info = make_info()
    alone = plan_cache(info, cache_bytes=16 * 8 * 20)
    beside = plan_cache(info, cache_bytes=16 * 8 * 20, draft_info=info)
    assert (alone.num_blocks, beside.num_blocks) == ((20,), (10,))


def test_pools_that_do_not_fit_the_model_are_refused() -> None:
    config = EngineConfig(num_blocks=(8,), max_seq_len=64)
    with pytest.raises(ConfigError, match="2 cache groups"):
        check_pools(config, (FULL, WINDOW))
    with pytest.raises(ConfigError, match="needs 16"):
        check_pools(EngineConfig(num_blocks=(8,), max_seq_len=256), (FULL,))
