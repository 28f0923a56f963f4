"""Choosing the size of a step, on a clock that the runner moves: nothing is timed."""

from __future__ import annotations

import pytest

from llmserve.engine.calibration import HEADROOM, calibrate, measure_cost
from llmserve.engine.config import EngineConfig
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Batch, CacheGroup
from llmserve.startup import EngineOptions, plan_engine, start_engine
from support.engines import make_config, make_info


class TimedRunner(FakeRunner):
    """Takes a time that follows from the batch: by tokens, and by what each attends to."""

    def __init__(
        self, *, base_s: float, token_s: float, pair_s: float = 0.0, **info: object
    ) -> None:
        super().__init__(make_info(**info))
        self.base_s, self.token_s, self.pair_s = base_s, token_s, pair_s
        self.now = 0.0
        self.batches: list[Batch] = []

    def submit(self, batch: Batch) -> None:
        self.now += self.base_s + self.token_s * batch.num_tokens
        self.now += self.pair_s * float(batch.positions.sum())
        self.batches.append(batch)
        super().submit(batch)

    def clock(self) -> float:
        return self.now


def config_of(**changes: object) -> EngineConfig:
    return make_config(**{"block_size": 16, "max_batched_tokens": 2048, **changes})


@pytest.mark.parametrize("token_s", [1e-5, 1e-4, 3e-4])
def test_full_step_stays_under_the_time_and_uses_it(token_s: float) -> None:
    runner = TimedRunner(base_s=0.005, token_s=token_s)
    found = calibrate(runner, config_of(), max_step_s=0.05, clock=runner.clock)
    seconds = 0.005 + token_s * found.max_batched_tokens
    assert seconds <= HEADROOM * 0.05
    assert found.max_batched_tokens == 2048 or seconds > HEADROOM * 0.05 - 17 * token_s
    assert found.full_step_s == pytest.approx(seconds, rel=0.02)
    assert found.step_cost.base_s == pytest.approx(0.005, rel=0.05)
    assert found.step_cost.token_s == pytest.approx(token_s, rel=0.05)


def test_tokens_at_the_start_of_a_prompt_are_more_than_at_its_end() -> None:
    length, pair_s = 1024, 2e-7
    runner = TimedRunner(base_s=0.001, token_s=5e-5, pair_s=pair_s, max_seq_len=length)
    config = config_of(max_seq_len=length, max_batched_tokens=2048)
    found = calibrate(runner, config, max_step_s=0.05, clock=runner.clock)

    def seconds(start: int, count: int) -> float:
        return 0.001 + 5e-5 * count + pair_s * count * (start + count / 2)

    near, far = found.max_batched_tokens, found.max_batched_tokens / found.far_token_weight
    assert far % 16 == near % 16 == 0
    assert near > 1.5 * far
    last_start = length - int(far)
    for start in range(0, last_start + 1, 16):
        weight = 1 + (found.far_token_weight - 1) * start / last_start
        count = min(int(near / weight), length - start)
        assert seconds(start, count) <= HEADROOM * 0.05 * 1.01
    assert seconds(length - int(far), int(far)) > HEADROOM * 0.05 * 0.8


def test_step_is_never_smaller_than_a_block() -> None:
    runner = TimedRunner(base_s=1.0, token_s=1.0)
    found = calibrate(runner, config_of(max_num_seqs=40), max_step_s=0.05, clock=runner.clock)
    assert found.max_batched_tokens == found.max_prefill_tokens == 16
    assert found.far_token_weight == 1.0
    assert found.full_step_s > 0.05


@pytest.mark.parametrize(("base_s", "limit_s"), [(0.001, 0.05), (0.019, 0.05), (0.2, 0.5025)])
def test_time_that_nobody_gives_is_a_multiple_of_a_large_models_smallest_step(
    base_s: float, limit_s: float
) -> None:
    runner = TimedRunner(base_s=base_s, token_s=0.001)
    found = calibrate(runner, config_of(), max_step_s=None, clock=runner.clock)
    assert found.max_step_s == pytest.approx(limit_s)
    seconds = base_s + 0.001 * found.max_batched_tokens
    assert HEADROOM * limit_s - 0.017 < seconds <= HEADROOM * limit_s


@pytest.mark.parametrize(
    ("base_s", "token_s", "most_s"), [(0.001, 0.001, 0.2), (0.2, 0.001, 1.0), (0.8, 0.01, 2.01)]
)
def test_step_in_which_nobody_decodes_takes_up_to_four_times_as_long_and_a_second(
    base_s: float, token_s: float, most_s: float
) -> None:
    runner = TimedRunner(base_s=base_s, token_s=token_s)
    found = calibrate(runner, config_of(), max_step_s=None, clock=runner.clock)
    assert found.max_prefill_tokens % 16 == 0
    seconds = base_s + token_s * found.max_prefill_tokens
    assert most_s - 17 * token_s < seconds <= most_s * 1.01


def test_step_in_which_nobody_decodes_is_no_larger_than_any_that_is_tried() -> None:
    runner = TimedRunner(base_s=0.001, token_s=1e-4)
    config = config_of(max_batched_tokens=640)
    found = calibrate(runner, config, max_step_s=0.05, clock=runner.clock)
    assert (found.max_batched_tokens, found.max_prefill_tokens) == (384, 640)


def test_cost_is_measured_no_further_than_steps_that_anybody_guesses_in() -> None:
    runner = TimedRunner(base_s=0.01, token_s=0.01)
    measure_cost(runner, config_of(), clock=runner.clock)
    assert max(batch.num_tokens for batch in runner.batches) == 32  # the first above 0.25 s


def test_steps_tried_are_full_ones_at_the_end_of_the_longest_prompt() -> None:
    runner = TimedRunner(base_s=1e-6, token_s=1e-6)
    calibrate(runner, config_of(), max_step_s=1.0, clock=runner.clock)
    largest = max(runner.batches, key=lambda batch: (batch.num_tokens, batch.positions.sum()))
    assert largest.num_tokens == 2048
    assert largest.context_lens.tolist() == [16] + [128] * 16
    assert largest.cu_seqlens[:3].tolist() == [0, 1, 129]


def test_windowed_pools_smaller_than_the_context_are_enough() -> None:
    group = CacheGroup(num_layers=1, window=20, bytes_per_token=8)
    runner = TimedRunner(base_s=1e-4, token_s=1e-5, cache_groups=(group,), max_seq_len=4096)
    config = config_of(max_seq_len=4096, max_batched_tokens=64)
    cost = measure_cost(runner, config, clock=runner.clock)
    assert cost.base_s == pytest.approx(1e-4, rel=0.05)


def test_size_that_is_given_is_taken_without_trying() -> None:
    runner = TimedRunner(base_s=1.0, token_s=1.0)
    options = EngineOptions(
        max_batched_tokens=96, max_prefill_tokens=160, far_token_weight=3.0, max_seq_len=64
    )
    config = plan_engine(runner, options)
    assert (config.max_batched_tokens, config.max_prefill_tokens) == (96, 160)
    assert config.far_token_weight == 3.0
    assert config.step_cost is None
    assert not runner.batches


def test_engine_keeps_what_was_found_for_the_run() -> None:
    engine = start_engine(
        FakeRunner(make_info(max_seq_len=64)), EngineOptions(max_num_seqs=4, max_step_s=10.0)
    )
    config = engine.config
    assert config.max_batched_tokens == 2048
    assert config.step_cost is not None
    assert config.full_step_s is not None
