"""Intervals against laws whose truth is known, over many seeded runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from llmserve.benchmarks.statistics import (
    Interval,
    Pool,
    _student_quantile,
    block_counts,
    ratio_of_intervals,
    ratio_of_runs,
)

NUM_RUNS = 300
NUM_UNITS = 120
COUNTS = block_counts(NUM_UNITS, num_draws=400)
# 95 of 100, less what the bootstrap loses on skewed laws; 3 standard errors of 300 runs to spare.
LEAST, MOST = 0.90, 0.99


def coverage(draw: Callable[[np.random.Generator], Interval | None], truth: float) -> float:
    rng = np.random.default_rng(7)
    intervals = [draw(rng) for _ in range(NUM_RUNS)]
    return float(np.mean([i is not None and i.low <= truth <= i.high for i in intervals]))


def exponential(rng: np.random.Generator) -> Pool:
    return Pool(rng.exponential(size=NUM_UNITS).tolist(), range(NUM_UNITS))


@pytest.mark.parametrize(
    ("interval", "truth"),
    [
        (lambda rng: exponential(rng).mean(COUNTS), 1.0),
        (lambda rng: exponential(rng).percentiles(COUNTS, [50])[0], math.log(2)),
        (lambda rng: exponential(rng).percentiles(COUNTS, [90])[0], math.log(10)),
    ],
    ids=["mean", "median", "p90"],
)
def test_interval_covers_the_truth_in_about_95_of_100_runs(
    interval: Callable[[np.random.Generator], Interval | None], truth: float
) -> None:
    assert LEAST <= coverage(interval, truth) <= MOST


def test_values_of_one_request_count_as_one_unit() -> None:
    """Gaps of a request share its speed: as 1,200 units of their own they cover far less."""

    def gaps(rng: np.random.Generator) -> list[float]:
        speeds = rng.gamma(4.0, 0.25, NUM_UNITS)
        return np.repeat(speeds, 10).tolist()  # type: ignore[no-any-return]

    units = np.repeat(np.arange(NUM_UNITS), 10).tolist()
    assert LEAST <= coverage(lambda rng: Pool(gaps(rng), units).mean(COUNTS), 1.0) <= MOST
    alone = block_counts(NUM_UNITS * 10, num_draws=200)
    iid = np.random.default_rng(0).permutation(NUM_UNITS * 10).tolist()
    assert coverage(lambda rng: Pool(gaps(rng), iid).mean(alone), 1.0) < 0.6


def test_percentiles_are_numpys_of_the_values_drawn() -> None:
    rng = np.random.default_rng(3)
    values, units = rng.normal(size=60), np.repeat(np.arange(20), 3)
    counts = block_counts(20, num_draws=5)
    pool = Pool(values.tolist(), units.tolist())
    drawn = np.concatenate(list(pool._percentiles(counts, np.array([0.73, 1.0]))), axis=1)
    oracle = [np.percentile(np.repeat(values, row[units]), [73, 100]) for row in counts]
    np.testing.assert_allclose(drawn.T, oracle, rtol=1e-12)


def test_draws_hold_as_many_units_as_there_are() -> None:
    assert set(block_counts(37, num_draws=50).sum(axis=1).tolist()) == {37}


def test_short_runs_have_no_interval() -> None:
    few = Pool([1.0, 2.0, 3.0], [0, 1, 2])
    assert few.mean(block_counts(3)) is None
    tail = exponential(np.random.default_rng(0)).percentiles(COUNTS, [90, 99])
    assert [interval is None for interval in tail] == [False, True]


def test_interval_of_a_constant_is_that_value() -> None:
    assert Pool([2.0] * NUM_UNITS, range(NUM_UNITS)).mean(COUNTS) == Interval(2.0, 2.0)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (30, 2.042272), (1e4, 1.960201)],
)
def test_student_quantile_is_that_of_the_tables(freedom: float, quantile: float) -> None:
    assert _student_quantile(freedom) == pytest.approx(quantile, rel=1e-4)


def test_equal_servers_show_no_difference_in_about_95_of_100() -> None:
    rng = np.random.default_rng(11)

    def figure() -> tuple[float, Interval]:
        values = rng.exponential(size=NUM_UNITS)
        interval = Pool(values.tolist(), range(NUM_UNITS)).mean(COUNTS)
        assert interval is not None
        return float(values.mean()), interval

    shown = [ratio_of_intervals(figure(), figure()).is_shown for _ in range(NUM_RUNS)]
    assert 1 - MOST <= np.mean(shown) <= 1 - LEAST


@pytest.mark.parametrize("num_runs", [2, 3, 8])
def test_equal_runs_show_no_difference_in_about_95_of_100(num_runs: int) -> None:
    rng = np.random.default_rng(13)
    runs = np.exp(0.1 * rng.normal(size=(1000, 2, num_runs)))
    shown = [ratio_of_runs(a.tolist(), b.tolist()).is_shown for a, b in runs]
    assert 0.01 <= np.mean(shown) <= 0.08


def test_true_ratio_is_found_and_covered() -> None:
    rng = np.random.default_rng(17)
    runs = np.exp(0.05 * rng.normal(size=(1000, 2, 4)))
    ratios = [ratio_of_runs((1.3 * a).tolist(), b.tolist()) for a, b in runs]
    covered = [ratio.interval.low <= 1.3 <= ratio.interval.high for ratio in ratios]
    assert 0.93 <= np.mean(covered) <= 0.98
    assert np.median([ratio.value for ratio in ratios]) == pytest.approx(1.3, rel=0.01)
    assert np.mean([ratio.is_shown for ratio in ratios]) > 0.95


def test_runs_that_are_all_alike_differ_for_sure() -> None:
    assert ratio_of_runs([2.0, 2.0], [1.0, 1.0]).interval == Interval(2.0, 2.0)
