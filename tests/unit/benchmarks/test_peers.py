"""Rounds under a budget, and prompts of exactly the length asked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmserve.benchmarks.metrics import compute_metrics
from llmserve.benchmarks.peers import Budget
from llmserve.benchmarks.peers_http import HttpLoad, exact_prompts, http_figures, round_prompts
from llmserve.text.tokenizer import Tokenizer
from support.records import make_record


def test_budget_lets_a_round_begin_only_if_the_longest_so_far_would_end_in_time() -> None:
    times: Iterator[float] = iter([0.0, 5.0, 15.0, 40.0, 60.0])  # made, then before each round
    budget = Budget(70.0, clock=lambda: next(times))
    assert [budget.has_room() for _ in range(4)] == [True, True, True, False]


def test_first_round_is_taken_whatever_the_budget() -> None:
    times: Iterator[float] = iter([0.0, 9.0, 10.0])
    budget = Budget(1e-9, clock=lambda: next(times))
    assert [budget.has_room(), budget.has_room()] == [True, False]


def test_prompts_are_exactly_as_long_as_asked_and_none_comes_twice() -> None:
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)} " * 20 for i in range(300)]
    tokenizer = Tokenizer.train("bpe", words, vocab_size=400)
    rng = np.random.default_rng(0)
    load = HttpLoad(requests={1: 2, 4: 5}, input_len=24, output_len=8)
    prompts = round_prompts(tokenizer, load, rng)
    assert {count: len(made) for count, made in prompts.items()} == {1: 3, 4: 6}
    texts = [str(prompt.content) for made in prompts.values() for prompt in made]
    assert len(set(texts)) == len(texts)
    assert {len(tokenizer.encode(text, add_special_tokens=False)) for text in texts} == {24}
    assert exact_prompts(tokenizer, 2, 24, np.random.default_rng(0))[0].content == texts[0]


def test_tokens_that_all_come_at_once_still_have_a_gap_to_divide_by() -> None:
    records = [make_record([1.0, 1.0, 1.0], tokens=3), make_record([2.0, 2.0, 2.0], tokens=3)]
    metrics = compute_metrics(records, duration_s=2.0, percentiles=(50.0, 99.0))
    figures = http_figures(8, metrics)
    assert figures == {
        "http 8 tokens/s": 3.0,
        "http 8 TTFT p50 ms": 1500.0,
        "http 8 ITL p99 ms": 0.001,
    }
