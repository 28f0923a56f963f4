"""Sliding windows: blocks that no later query sees are given back, and never before."""

from __future__ import annotations

import pytest

from llmserve.engine.engine import Engine
from llmserve.runners.fake import FakeRunner, next_token
from llmserve.runners.protocol import CacheGroup
from support.engines import VOCAB, make_engine, make_info, make_request, run, tokens_by_choice

WINDOW = 10
WINDOWED = CacheGroup(num_layers=1, window=WINDOW, bytes_per_token=8)
FULL = CacheGroup(num_layers=1, window=None, bytes_per_token=8)
PROMPTS = [[(7 * i + j) % 97 for j in range(1 + 7 * i)] for i in range(8)]


def windowed(**changes: object) -> Engine:
    return make_engine(FakeRunner(make_info(cache_groups=(WINDOWED,))), **changes)


def answer(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, VOCAB, WINDOW))
    return ids[len(prompt) :]


@pytest.mark.parametrize("budget", [16, 64])
@pytest.mark.parametrize("num_blocks", [20, 200])
def test_tokens_are_those_of_the_window_alone(budget: int, num_blocks: int) -> None:
    engine = windowed(num_blocks=num_blocks, max_batched_tokens=budget)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(make_request(f"r{index}", prompt, max_tokens=50))
    tokens = tokens_by_choice(run(engine))
    for index, prompt in enumerate(PROMPTS):
        assert tokens[f"r{index}", 0] == answer(prompt, 50)


def test_decoding_holds_a_window_and_no_more() -> None:
    engine = windowed()
    engine.add_request(make_request("a", [1] * 30, max_tokens=90))
    while engine.stats().num_decode_tokens < 3:
        engine.step(0.0)
    while engine.has_work:
        engine.step(0.0)
        engine.check()
        stats = engine.stats()
        # Ten visible tokens and the one being written lie in at most four blocks of four.
        assert stats.num_blocks - stats.num_free_blocks <= 4


def test_pool_smaller_than_a_sequence_serves_it_all_the_same() -> None:
    engine = windowed(num_blocks=8, max_batched_tokens=16, max_num_seqs=4)
    for name in "abc":
        engine.add_request(make_request(name, PROMPTS[7], max_tokens=60, seed=ord(name)))
    tokens = tokens_by_choice(run(engine))
    assert all(ids == answer(PROMPTS[7], 60) for ids in tokens.values())


def test_hit_needs_no_more_than_the_window_before_it() -> None:
    engine = windowed(num_blocks=64)
    prompt = [j % 97 for j in range(62)]
    engine.add_request(make_request("a", prompt, max_tokens=1))
    run(engine)
    engine.add_request(make_request("b", prompt, max_tokens=4))
    outputs = run(engine)
    assert outputs[0].num_cached_tokens == 61
    assert tokens_by_choice(outputs)["b", 0] == answer(prompt, 4)


def test_groups_release_on_their_own() -> None:
    runner = FakeRunner(make_info(cache_groups=(FULL, WINDOWED)))
    engine = make_engine(runner, num_blocks=(64, 10), max_batched_tokens=16)
    engine.add_request(make_request("a", [3] * 60, max_tokens=40))
    run(engine)
    alone = make_engine(FakeRunner(make_info(cache_groups=(FULL, WINDOWED))), num_blocks=(64, 64))
    for target in (engine, alone):
        target.add_request(make_request("b", [4] * 60, max_tokens=40))
    assert tokens_by_choice(run(engine)) == tokens_by_choice(run(alone))
