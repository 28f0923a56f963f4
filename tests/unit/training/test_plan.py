"""Planning the steps of a time budget, on a clock made here."""

from __future__ import annotations

import pytest

from llmserve.training.plan import StepPlanner


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def plan(clock: Clock, planner: StepPlanner, *, step_s: float, slow_s: float) -> tuple[int, int]:
    """Steps done when the plan came, and the plan."""
    for step in range(1, 10_000):
        clock.now += slow_s if step <= 3 else step_s
        planned = planner.after_step(step)
        if planned is not None:
            return step, planned
    raise AssertionError("never planned")


@pytest.mark.parametrize("step_s", [0.001, 0.01, 0.1, 1.0])
def test_planned_steps_fill_the_budget(clock: Clock, step_s: float) -> None:
    began = clock.now
    clock.now += 5  # preparing the text
    planner = StepPlanner(minutes=1, began=began)
    step, planned = plan(clock, planner, step_s=step_s, slow_s=5 * step_s)
    end = clock.now + (planned - step) * step_s
    assert 0.85 * 60 < end - began < 60


def test_budget_that_is_spent_before_the_plan_ends_the_run(clock: Clock) -> None:
    planner = StepPlanner(minutes=0.1, began=clock.now)
    step, planned = plan(clock, planner, step_s=10, slow_s=10)
    assert step == planned == 4
