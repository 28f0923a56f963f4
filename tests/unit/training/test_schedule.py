"""The learning rate over a run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from llmserve.training.schedule import learning_rate


def rates(steps: int, warmup_steps: int) -> list[float]:
    return [
        learning_rate(step, steps=steps, warmup_steps=warmup_steps, highest=1.0, final=0.1)
        for step in range(steps)
    ]


def test_rises_to_the_highest_and_falls_to_the_final() -> None:
    values = rates(100, 10)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == max(values) == 1.0
    assert values[9:] == sorted(values[9:], reverse=True)
    assert values[-1] == pytest.approx(0.1)


def test_half_way_down_it_is_in_the_middle() -> None:
    assert rates(110, 10)[59] == pytest.approx((1.0 + 0.1) / 2)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 10), (5, 10), (10, 10)])
def test_short_runs_have_a_positive_rate(steps: int, warmup_steps: int) -> None:
    assert all(rate > 0 for rate in rates(steps, warmup_steps))


def test_rate_of_the_first_steps_does_not_depend_on_the_plan() -> None:
    for step in range(10):
        arguments = {"warmup_steps": 10, "highest": 1.0, "final": 0.1}
        assert learning_rate(step, steps=None, **arguments) == learning_rate(  # type: ignore[arg-type]
            step, steps=1000, **arguments
        )


def shaped(schedule: Any, steps: int = 100, decay_share: float = 0.2) -> list[float]:
    return [
        learning_rate(
            step,
            steps=steps,
            warmup_steps=10,
            highest=1.0,
            final=0.1,
            schedule=schedule,
            decay_share=decay_share,
        )
        for step in range(steps)
    ]


def test_constant_stays_at_the_highest() -> None:
    assert set(shaped("constant")[9:]) == {1.0}


def test_stable_part_is_followed_by_a_line_down_to_the_final() -> None:
    values = shaped("wsd")
    assert set(values[9:80]) == {1.0}
    falls = [before - after for before, after in pairwise(values[79:])]
    assert falls == pytest.approx([0.9 / 20] * 20)
    assert values[-1] == pytest.approx(0.1)


def test_whole_run_may_fall() -> None:
    values = shaped("wsd", decay_share=1.0)
    assert values[9] == 1.0
    assert values[10:] == sorted(values[10:], reverse=True)
