"""Blocks of a prompt from one engine's prefix cache in another's: hits, and the same tokens."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.engine.engine import Engine
from llmserve.engine.prefix_transfer import ByteArray, transfer_bytes
from llmserve.engine.request import Request
from llmserve.errors import ConfigError, EngineError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import CacheGroup
from support.engines import make_engine, make_info, make_request, run, tokens_by_choice

BLOCK = 4
PROMPT = list(range(10, 40))  # 7 blocks of 4, and 2 tokens
GROUPS = {
    "one group": (CacheGroup(num_layers=1, window=None, bytes_per_token=8),),
    "a window": (
        CacheGroup(num_layers=1, window=None, bytes_per_token=8),
        CacheGroup(num_layers=1, window=6, bytes_per_token=8),
    ),
}


class OnlySteps:
    """A runner that keeps its cache to itself."""

    def __init__(self) -> None:
        self._runner = FakeRunner(make_info())
        self.info, self.overlaps = self._runner.info, False
        self.allocate_cache, self.close = self._runner.allocate_cache, self._runner.close
        self.submit, self.collect = self._runner.submit, self._runner.collect


def engine_of(groups: tuple[CacheGroup, ...], num_blocks: int = 64) -> Engine:
    runner = FakeRunner(make_info(cache_groups=groups))
    return make_engine(runner, num_blocks=(num_blocks,) * len(groups), max_seq_len=64)


def read(engine: Engine, request: Request) -> tuple[int, ByteArray]:
    """The blocks of a prompt that the engine computes now."""
    prompt = make_request("read", request.prompt_token_ids, max_tokens=0)
    prompt.cache_salt = request.cache_salt
    engine.add_request(prompt)
    run(engine)
    out = np.zeros(transfer_bytes(16, BLOCK * 16), np.uint8)
    return engine.prefix_transfer().read(request, out), out


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("length", [30, 28, 33])
def test_an_engine_goes_on_from_anothers_blocks(
    groups: tuple[CacheGroup, ...], length: int
) -> None:
    request = make_request("a", list(range(10, 10 + length)), seed=3, temperature=1.0)
    alone, writer = engine_of(groups), engine_of(groups)
    num_blocks, data = read(engine_of(groups), request)
    assert num_blocks == length // BLOCK
    assert writer.prefix_transfer().write(request, num_blocks, data) > 0
    writer.check()
    for engine in (alone, writer):
        engine.add_request(make_request("a", request.prompt_token_ids, seed=3, temperature=1.0))
    outputs = run(writer)
    assert tokens_by_choice(outputs) == tokens_by_choice(run(alone))
    assert outputs[0].num_cached_tokens == min(num_blocks * BLOCK, length - 1)


def test_blocks_that_are_there_are_kept_and_only_others_written() -> None:
    request = make_request("a", PROMPT)
    num_blocks, data = read(engine_of(GROUPS["one group"]), request)
    writer = engine_of(GROUPS["one group"])
    writer.add_request(make_request("b", PROMPT[:14]))
    run(writer)
    assert writer.prefix_transfer().write(request, num_blocks, data) == 7 - 3
    assert writer.prefix_transfer().write(request, num_blocks, data) == 0
    writer.check()


def test_where_no_block_is_free_nothing_is_taken_in() -> None:
    request = make_request("a", PROMPT)
    num_blocks, data = read(engine_of(GROUPS["a window"]), request)
    writer = engine_of(GROUPS["a window"], num_blocks=16)
    writer.add_request(make_request("b", [1] * 44, max_tokens=8))
    writer.step(0.0)
    assert writer.prefix_transfer().write(request, num_blocks, data) == 0
    writer.check()
    writer.add_request(request)
    alone = engine_of(GROUPS["a window"])
    alone.add_request(make_request("a", PROMPT))
    assert tokens_by_choice(run(writer))["a", 0] == tokens_by_choice(run(alone))["a", 0]


def test_another_prompts_or_tenants_blocks_are_refused() -> None:
    request = make_request("a", PROMPT)
    num_blocks, data = read(engine_of(GROUPS["one group"]), request)
    transfer = engine_of(GROUPS["one group"]).prefix_transfer()
    others = [
        make_request("b", [9, *PROMPT[1:]]),
        make_request("c", PROMPT, cache_salt="another tenant"),
        make_request("d", PROMPT[:20]),
    ]
    for other in others:
        with pytest.raises(EngineError, match="another prompt"):
            transfer.write(other, num_blocks, data)


def test_evicted_blocks_are_not_read_and_a_small_place_is_refused() -> None:
    request = make_request("a", PROMPT)
    reader = engine_of(GROUPS["one group"], num_blocks=16)
    read(reader, request)
    with pytest.raises(EngineError, match="above the 40 given"):
        reader.prefix_transfer().read(request, np.zeros(40, np.uint8))
    reader.add_request(make_request("b", [1] * 60, max_tokens=1))
    run(reader)
    out = np.zeros(transfer_bytes(16, BLOCK * 16), np.uint8)
    assert reader.prefix_transfer().read(request, out) < 7


def test_an_engine_without_a_prefix_cache_or_a_readable_one_refuses() -> None:
    with pytest.raises(ConfigError, match="this engine has none"):
        make_engine(has_prefix_cache=False).prefix_transfer()
    with pytest.raises(ConfigError, match="the fake runner cannot hand KV blocks"):
        make_engine(OnlySteps()).prefix_transfer()
