"""How many steps fit into a time budget: the first ones are timed, the rest is arithmetic.

A schedule needs to know its end. With `minutes` the number of steps is fixed once, early in the
run, and recorded; from then on the run is like one with `steps`, and resumes exactly like it.
"""

from __future__ import annotations

import time

__all__ = ["StepPlanner"]

_UNTIMED_STEPS = 3
"""First steps, slowed by allocations and one-time choices of kernels."""
_TIMED_SHARE = 0.04
"""Part of the budget that is spent on timing."""
_MIN_TIMED_STEPS = 5
_WORK_SHARE = 0.92
"""Part of the remaining time for steps; the rest is for evaluations, checkpoints and the end."""


class StepPlanner:
    """Plans the steps of a run that began at `began` (`time.monotonic()`) and has `minutes`."""

    def __init__(self, *, minutes: float, began: float) -> None:
        self._budget_s = minutes * 60
        self._deadline = began + self._budget_s
        self._steps = 0
        self._timed_from = 0.0

    def after_step(self, step: int) -> int | None:
        """Call after each step; `step` counts those done. The planned total, once it is known."""
        now = time.monotonic()
        self._steps += 1
        if self._steps == _UNTIMED_STEPS:
            self._timed_from = now
        timed = self._steps - _UNTIMED_STEPS
        if timed < 1:
            return None
        elapsed = now - self._timed_from
        is_enough = timed >= _MIN_TIMED_STEPS and elapsed >= _TIMED_SHARE * self._budget_s
        if not is_enough and now < self._deadline:
            return None
        left = max(0.0, self._deadline - now)
        return step + int(_WORK_SHARE * left * timed / elapsed)
