"""Sizes of an engine from a memory budget."""

from __future__ import annotations

import pytest

from llmserve.engine.config import EngineConfig, plan_cache
from llmserve.errors import ConfigError
from support.engines import make_info


def test_pool_takes_what_the_budget_buys() -> None:
    config = plan_cache(make_info(), cache_bytes=16 * 8 * 20)
    assert (config.num_blocks, config.max_seq_len) == (20, 256)


def test_pool_is_no_larger_than_all_sequences_can_use() -> None:
    config = plan_cache(make_info(), cache_bytes=1 << 30, max_num_seqs=3)
    assert config.num_blocks == 3 * 256 // 16


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


def test_more_sequences_than_tokens_in_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="could not advance"):
        EngineConfig(num_blocks=8, max_seq_len=16, max_batched_tokens=4, max_num_seqs=5)


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_size_that_is_no_positive_whole_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        EngineConfig(num_blocks=8, block_size=value, max_seq_len=16)  # type: ignore[arg-type]
