"""The fit against problems whose answer is known: a runner that obeys a cost model exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmserve.benchmarks.cost_fit import fit_cost_model, non_negative_least_squares
from llmserve.benchmarks.cost_model import CostModel, parse_cost_model
from llmserve.benchmarks.virtual_runner import VirtualClock, VirtualRunner
from llmserve.errors import ConfigError
from llmserve.runners.protocol import Batch


def virtual(
    cost: CostModel, *, max_seq_len: int = 512, repeats_decodes: bool = True
) -> tuple[VirtualRunner, VirtualClock]:
    clock = VirtualClock()
    runner = VirtualRunner(cost, clock, max_seq_len=max_seq_len, repeats_decodes=repeats_decodes)
    return runner, clock


@pytest.mark.parametrize(
    "text",
    [
        "base_ms=2,token_us=30,seq_us=9,context_ns=200,pair_ns=50",
        "base_ms=5,token_us=100",
        "token_us=20,pair_ns=3",
        "base_ms=8,context_ns=40",
        "base_ms=0.05,token_us=7,context_ns=20,step_ms=0.1",
        "token_us=7,seq_us=1,pair_ns=3,step_ms=30",
    ],
)
def test_costs_of_a_runner_that_has_them_are_found(text: str) -> None:
    cost = parse_cost_model(text)
    runner, clock = virtual(cost)
    fit = fit_cost_model(
        runner, max_num_seqs=8, max_batched_tokens=128, clock=lambda: clock.now_s, max_s=1e9
    )
    for found, true in zip(fit.cost.coefficients, cost.coefficients, strict=True):
        assert found == pytest.approx(true, rel=1e-6, abs=1e-15)
    assert (fit.most_tokens, fit.most_sequences) == (128, 8)
    assert max(fit.median_error, fit.p90_error, abs(fit.total_error)) < 1e-6


def test_cost_of_a_step_is_the_rounds_where_every_step_has_one() -> None:
    cost = parse_cost_model("base_ms=2,token_us=30,step_ms=1")
    runner, clock = virtual(cost, repeats_decodes=False)
    fit = fit_cost_model(
        runner, max_num_seqs=8, max_batched_tokens=128, clock=lambda: clock.now_s, max_s=1e9
    )
    assert (fit.cost.base_s, fit.cost.step_s) == (pytest.approx(3e-3), 0.0)
    assert fit.cost.token_s == pytest.approx(30e-6)


class DisturbedRunner(VirtualRunner):
    """One in ten of its steps is held up by something else on the machine."""

    def __init__(self, cost: CostModel, clock: VirtualClock) -> None:
        super().__init__(cost, clock, max_seq_len=100)
        self.clock = clock
        self.num_disturbed = 0
        self._rng = np.random.default_rng(0)

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        if self._rng.random() < 0.1:
            self.clock.advance(0.5)
            self.num_disturbed += 1


def test_what_disturbs_one_repeat_does_not_count() -> None:
    clock = VirtualClock()
    runner = DisturbedRunner(parse_cost_model("base_ms=2,token_us=30,step_ms=1"), clock)
    fit = fit_cost_model(
        runner, max_num_seqs=1, max_batched_tokens=8, clock=lambda: clock.now_s, max_s=1e9
    )
    assert runner.num_disturbed > 5
    assert fit.cost.base_s == pytest.approx(2e-3)
    assert fit.cost.step_s == pytest.approx(1e-3)
    assert fit.cost.token_s == pytest.approx(30e-6)


def test_time_is_bounded_by_the_loads_left_out() -> None:
    cost = parse_cost_model("base_ms=500")
    runner, clock = virtual(cost)
    fit = fit_cost_model(
        runner, max_num_seqs=64, max_batched_tokens=128, clock=lambda: clock.now_s, max_s=1.0
    )
    assert fit.most_sequences == 1  # the lightest load alone
    assert fit.cost.base_s > 0


def test_context_too_short_to_be_timed_is_refused() -> None:
    runner, clock = virtual(parse_cost_model("base_ms=1"), max_seq_len=4)
    with pytest.raises(ConfigError, match="a context of 4 tokens is too short"):
        fit_cost_model(runner, max_num_seqs=2, max_batched_tokens=16, clock=lambda: clock.now_s)


def test_report_says_what_was_measured() -> None:
    runner, clock = virtual(parse_cost_model("base_ms=2"))
    fit = fit_cost_model(runner, max_num_seqs=2, max_batched_tokens=64, clock=lambda: clock.now_s)
    assert "base_ms=2," in str(fit)
    assert f"{fit.num_steps} steps of up to 64 tokens, 2 sequences" in str(fit)


def grid_minimum(columns: np.ndarray, target: np.ndarray) -> float:
    """The least error over a fine grid of non-negative x, for three columns."""
    values = np.linspace(0, 2, 21)
    points = np.array(list(itertools.product(values, repeat=3)))
    return float(((columns @ points.T - target[:, None]) ** 2).sum(axis=0).min())


@pytest.mark.parametrize("seed", range(8))
def test_least_squares_stays_at_or_above_zero_and_is_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(12, 3))
    target = columns @ rng.uniform(-1, 1, 3) + rng.normal(scale=0.1, size=12)
    x = non_negative_least_squares(columns, target)
    assert (x >= 0).all()
    error = float(((columns @ x - target) ** 2).sum())
    assert error <= grid_minimum(columns, target) + 1e-9
    # The conditions of the minimum: no slope where x is above 0, none downwards where it is 0.
    slope = columns.T @ (columns @ x - target)
    assert np.abs(slope[x > 0]).max(initial=0) < 1e-8
    assert slope[x == 0].min(initial=0) > -1e-8


def test_target_that_only_negative_values_reach_gives_zero() -> None:
    x = non_negative_least_squares(np.eye(2), np.array([-1.0, -2.0]))
    assert x.tolist() == [0.0, 0.0]
