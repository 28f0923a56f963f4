from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from llmserve.benchmarks.trace_prompts import trace_prompts
from llmserve.benchmarks.traces import TraceOptions, open_trace
from support.traces import azure_trace, mooncake_trace


def test_equal_blocks_are_equal_tokens_and_others_differ(tmp_path: Path) -> None:
    rows = [(0.0, 1200, 5, [1, 2, 3]), (1.0, 1024, 6, [1, 4]), (2.0, 600, 7, [5, 2])]
    path = mooncake_trace(tmp_path / "t.jsonl", rows)
    trace = open_trace(path, TraceOptions(length_scale=Fraction(1, 16)))
    first, second, third = trace_prompts(trace, range(1000), seed=0)
    assert [len(p.content) for p in (first, second, third)] == [75, 64, 38]
    assert [p.num_tokens for p in (first, second, third)] == [75, 64, 38]
    assert [p.output_len for p in (first, second, third)] == [1, 1, 1]
    assert first.content[:32] == second.content[:32]
    assert first.content[32:64] != second.content[32:64]
    assert third.content[:32] != first.content[:32]
    assert third.content[32:] == first.content[32:38]  # key 2, cut short


def test_traces_without_blocks_share_nothing(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "t.csv", [(0.0, 30, 4), (0.5, 30, 5)])
    trace = open_trace(path, TraceOptions())
    first, second = trace_prompts(trace, range(1000), seed=0)
    assert first.content != second.content
    assert (len(first.content), second.output_len, second.index) == (30, 5, 1)
    assert trace_prompts(trace, range(1000), seed=0) == [first, second]
    assert trace_prompts(trace, range(1000), seed=1) != [first, second]
