"""Offline throughput over the scripted runner: what is counted, and in which order."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from llmserve.benchmarks.cli_bench import add_arguments
from llmserve.benchmarks.throughput import (
    ThroughputOptions,
    engine_rate,
    measure,
    plain_rate,
    throughput_options,
    throughput_result,
)
from llmserve.engine.engine import Engine
from llmserve.errors import ConfigError, EngineError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.protocol import Batch
from support.engines import expected, make_engine, make_info

PROMPTS = [[1 + i, 2, 3] for i in range(7)]


class CountingRunner(FakeRunner):
    """Remembers the tokens and sequences of each step; its clock moves by one at each."""

    def __init__(self) -> None:
        super().__init__(make_info())
        self.num_steps = 0
        self.most_sequences = 0

    def submit(self, batch: Batch) -> None:
        self.num_steps += 1
        self.most_sequences = max(self.most_sequences, len(batch.context_lens))
        super().submit(batch)

    def clock(self) -> float:
        return float(self.num_steps)


def parse(*arguments: str) -> ThroughputOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return throughput_options(parser.parse_args(["throughput", "model", *arguments]))


def test_how_the_model_is_computed_reaches_the_options() -> None:
    assert parse().running["runner"] == "auto"
    assert parse().running["native"] is None
    options = parse("--runner", "native", "--threads", "1", "--kv-cache-dtype", "int8")
    assert options.running["runner"] == "native"
    assert options.running["threads"] == 1
    assert options.running["native"] == NativeOptions(cache_dtype="int8")
    assert (parse().is_verified, parse("--no-verify").is_verified) == (True, False)


@pytest.mark.parametrize("concurrency", [1, 3, 7])
def test_rate_is_tokens_over_time_at_the_concurrency_asked(concurrency: int) -> None:
    runner = CountingRunner()
    rate = engine_rate(
        make_engine(runner), PROMPTS, output_len=5, concurrency=concurrency, clock=runner.clock
    )
    assert runner.most_sequences == concurrency
    assert rate == pytest.approx(7 * 5 / runner.num_steps)
    if concurrency == 1:
        assert runner.num_steps == 7 * 5


def test_engine_runs_to_the_length_past_end_ids() -> None:
    first_token = expected(PROMPTS[0], 1)[0]
    engine: Engine = make_engine(FakeRunner(make_info(eos_token_ids=(first_token,))))
    assert engine_rate(engine, PROMPTS, output_len=5, concurrency=2) > 0
    assert not engine.has_work


def test_request_that_ends_otherwise_is_an_error() -> None:
    engine = make_engine()
    with pytest.raises(EngineError, match="ended as abort"):
        engine_rate(_Aborting(engine), PROMPTS, output_len=5, concurrency=2)  # type: ignore[arg-type]


class _Aborting:
    """An engine whose first request is aborted after a step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.add_request = engine.add_request

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def step(self, now: float) -> list[object]:
        outputs = self._engine.step(now)
        self._engine.abort("bench-0")
        return list(outputs)


def test_plain_rate_counts_what_the_loop_made() -> None:
    times = iter([10.0, 14.0])
    rate = plain_rate(
        lambda ids, count: [0] * count, PROMPTS, output_len=6, clock=lambda: next(times)
    )
    assert rate == 7 * 6 / 4


def test_settings_take_turns_with_new_prompts_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    options = ThroughputOptions(
        model=Path("m"), num_prompts=2, concurrency=(1, 2), input_len=4, output_len=3, repeats=2
    )
    calls: list[str] = []
    seen: list[tuple[int, ...]] = []

    def setting(name: str) -> object:
        def rate(prompts: list[list[int]]) -> float:
            calls.append(name)
            seen.extend(map(tuple, prompts))
            return float(len(calls))

        return rate

    rates = measure({"a": setting("a"), "b": setting("b")}, options, vocab_size=1000)  # type: ignore[dict-item]
    assert calls == ["a", "b", "a", "b", "a", "b"]  # the first of each warms up
    assert rates == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert len(set(seen)) == len(seen) == 2 + 4 * 2
    assert {len(prompt) for prompt in seen} == {4}
    assert capsys.readouterr().err.count("tokens/s") == 4


def test_result_takes_ratios_within_each_repeat() -> None:
    options = ThroughputOptions(model=Path("m"), concurrency=(1, 4))
    rates = {
        "plain loop": [8.0, 4.0, 2.0],
        "1 at a time": [10.0, 6.0, 3.0],
        "4 at a time": [40.0, 12.0, 9.0],
    }
    result = throughput_result(options, rates)
    one, four = result["concurrency"]  # type: ignore[misc]
    assert (one["output_throughput"], one["ratio_to_one_stream"]) == (6.0, 1.0)
    assert (four["output_throughput"], four["ratio_to_one_stream"]) == (12.0, 3.0)
    assert result["plain"] == {"output_throughput": 4.0, "runs": [8.0, 4.0, 2.0]}
    assert result["one_stream_over_plain"] == 1.5


def test_result_without_a_base_has_no_ratio() -> None:
    options = ThroughputOptions(model=Path("m"), concurrency=(4,))
    result = throughput_result(options, {"4 at a time": [4.0, 4.0, 4.0]})
    assert result["concurrency"][0]["ratio_to_one_stream"] is None  # type: ignore[index]
    assert result["plain"] is None
    assert result["one_stream_over_plain"] is None


def test_options_of_the_command_line() -> None:
    options = parse("--concurrency", "16,1,4,4", "--input-len", "3", "--baseline", "plain")
    assert options.concurrency == (1, 4, 16)
    assert options.input_len == 3
    assert options.has_plain_baseline
    assert not parse().has_plain_baseline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--concurrency 1,x", "whole numbers"),
        ("--concurrency 0", "at least 1"),
        ("--repeats 0", "at least 1"),
        ("--concurrency 17", "raise --num-prompts"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments.split())
