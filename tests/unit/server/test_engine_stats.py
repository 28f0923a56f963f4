from __future__ import annotations

from dataclasses import replace

from llmserve.server.engine_stats import total_stats
from support.engines import make_engine, make_request, run


def test_the_whole_is_the_sum_and_the_fullest_pool_counts() -> None:
    idle, busy = make_engine(), make_engine()
    busy.add_request(make_request("a", [1, 2, 3]))
    run(busy)
    one, other = idle.stats(), replace(busy.stats(), cache_usage=0.5, accepted_per_position=[2, 1])
    whole = total_stats([one, other, replace(one, accepted_per_position=[1])])
    assert whole.num_decode_tokens == other.num_decode_tokens > 0
    assert whole.num_blocks == 3 * one.num_blocks
    assert whole.cache_usage == 0.5
    assert whole.accepted_per_position == [3, 1]
    assert total_stats([one]) is one
