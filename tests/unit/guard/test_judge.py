"""The regression guard's verdicts: a loss above the limit fails, equal trees do not."""

from __future__ import annotations

import numpy as np
import pytest

from guard.judge import judge, table


def rounds(cost: float, noise: float, count: int, rng: np.random.Generator) -> list[float]:
    return (cost * np.exp(rng.normal(0, noise, count))).tolist()


# Counts move by a tenth of a percent, times by percents.
@pytest.mark.parametrize(("noise", "count"), [(0.0, 2), (0.001, 2), (0.02, 9)])
def test_a_planted_loss_of_a_tenth_fails(noise: float, count: int) -> None:
    rng = np.random.default_rng(1)
    caught = 0
    for _ in range(100):
        base = {"decode": rounds(150, noise, count, rng), "stream": rounds(390, noise, count, rng)}
        tree = {"decode": rounds(165, noise, count, rng), "stream": rounds(390, noise, count, rng)}
        lost = [one.case for one in judge(base, tree) if one.is_lost]
        assert "stream" not in lost
        caught += lost == ["decode"]
    assert caught >= 98


@pytest.mark.parametrize(("noise", "count"), [(0.0, 2), (0.001, 2), (0.02, 9), (0.06, 9)])
def test_equal_trees_pass(noise: float, count: int) -> None:
    rng = np.random.default_rng(2)
    failed = 0
    for _ in range(200):
        base, tree = ({"a": rounds(10, noise, count, rng)} for _ in range(2))
        failed += judge(base, tree)[0].is_lost
    assert failed <= 10  # one in forty is expected where noise is far above the limit


def test_a_loss_below_the_limit_and_a_gain_pass() -> None:
    base = {"small": [100.0, 100.1], "gain": [100.0, 100.1], "noisy": [100.0, 80.0]}
    tree = {"small": [103.0, 103.1], "gain": [80.0, 80.1], "noisy": [112.0, 91.0]}
    small, gain, noisy = judge(base, tree)
    assert small.word == "dearer, within the limit"
    assert gain.word == "cheaper"
    assert gain.ratio == pytest.approx(0.8, rel=1e-3)
    assert noisy.ratio > 1.05
    assert noisy.word == "LOST"


def test_a_loss_that_noise_may_be_is_none() -> None:
    (verdict,) = judge({"a": [100.0, 100.0]}, {"a": [120.0, 101.0]})
    assert verdict.ratio > 1.05
    assert verdict.word == "no difference shown"
    assert not verdict.is_lost


def test_what_the_base_does_not_know_is_not_judged() -> None:
    verdicts = judge({"old": [1.0, 1.0]}, {"old": [1.2, 1.2], "new": [5.0, 5.0]})
    assert [verdict.case for verdict in verdicts] == ["old"]
    head, line = table(verdicts, "ms")
    assert "ms" in head
    assert line.startswith("old")
    assert line.endswith("LOST")
